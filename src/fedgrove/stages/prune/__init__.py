"""Fewer channels and heads in every block: what they are worth, and what it takes to find out."""
