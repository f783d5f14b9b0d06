"""Tuning along random directions that everybody regenerates from their seeds: noise, replay, and losses on both sides."""
