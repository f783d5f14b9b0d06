"""What clients are asked in a stage that prunes."""
