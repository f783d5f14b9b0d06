"""One round: ask the clients, bring their tensors over the wire, fold them into one sum."""
