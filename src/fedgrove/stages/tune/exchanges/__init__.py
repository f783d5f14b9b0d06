"""The requests of a stage that fine-tunes."""
