"""Reads a run folder and shows it. No stage knows that a report exists."""
