"""Sums over the inputs of linears: what clients sum, how sums become exact, and the exchange of every stage that needs them."""
