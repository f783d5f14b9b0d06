"""Language models, block by block: read from disk, run, calibrate, write."""
