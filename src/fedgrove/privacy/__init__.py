"""Privacy around the sums: secure aggregation, Gaussian noise, how much of it a promise needs, and what is promised."""
