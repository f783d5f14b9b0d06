"""Requests to a site itself, before and after the stages: join the run, take the result, delete the working files."""
