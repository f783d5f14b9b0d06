"""Secure aggregation and differential privacy: Gaussian noise, its accounting, and the guarantees."""
