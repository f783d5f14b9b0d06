"""Exchanges that belong to no stage: what a client has, and the phases of secure aggregation."""
