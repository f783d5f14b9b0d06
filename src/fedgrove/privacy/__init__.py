"""Privacy around the sums: each file holds what the client does and what the server does, so that they agree."""
