"""Reading a model without trusting it."""
