"""A pool of adapters: several members instead of one adapter, and a gate that says how much of each a text gets."""
