"""Prompts from scores: the server names candidates, every client scores the same ones on its own records."""
