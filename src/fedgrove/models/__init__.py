"""Language models, one block at a time: read from disk, run, measured, written."""
