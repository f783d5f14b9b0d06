"""Stages: one function each, (model, plan, engine, run) -> model."""
