"""The stage kind ``prune``: sets a part of every weight matrix to zero."""
