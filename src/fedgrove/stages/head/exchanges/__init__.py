"""The requests to clients in a stage that makes a classification head."""
