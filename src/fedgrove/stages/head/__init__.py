"""The stage kind ``head``: a classification head on the frozen model, from sums over everybody's labeled records."""
