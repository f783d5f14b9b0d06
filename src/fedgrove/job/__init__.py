"""The job file as one frozen object: its tables, the types of their keys, and the reader of the file."""
