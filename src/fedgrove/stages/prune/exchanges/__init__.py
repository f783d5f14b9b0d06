"""The requests to clients in a stage that prunes."""
