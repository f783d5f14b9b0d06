"""What clients are asked in a stage that fine-tunes."""
