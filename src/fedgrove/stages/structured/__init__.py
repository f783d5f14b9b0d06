"""The stage kind ``structured``: removes whole MLP channels and attention heads from every block."""
