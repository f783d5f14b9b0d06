"""Evaluation: perplexity, accuracy, generation, speed and tasks, before, during and after a run."""
