"""One round: send requests to clients, receive their tensors, aggregate them."""
