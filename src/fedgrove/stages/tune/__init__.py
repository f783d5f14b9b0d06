"""Fine-tuning with low-rank adapters: which weights, within which budget, how they are trained."""
