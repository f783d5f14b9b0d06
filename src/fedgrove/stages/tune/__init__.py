"""Fine-tuning: what is trained, how each client is configured within its budget, and how changes are aggregated."""
