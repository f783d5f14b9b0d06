"""The requests to clients in a stage that cuts channels and heads."""
