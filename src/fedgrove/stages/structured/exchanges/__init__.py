"""What clients are asked in a stage that cuts channels and heads."""
