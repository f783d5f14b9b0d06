"""Exchanges that belong to no stage: a client's capabilities, and the phases of secure aggregation."""
