"""The stages of a job. Each kind of stage is a folder here; :mod:`fedgrove.stages.base` describes its interface."""
