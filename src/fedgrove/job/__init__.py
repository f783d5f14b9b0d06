"""The job: what somebody wants, as one frozen object. Tables, the types of their keys, and the reader of the file."""
