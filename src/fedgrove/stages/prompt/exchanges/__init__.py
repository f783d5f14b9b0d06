"""The requests to clients in a stage that looks for a prompt."""
