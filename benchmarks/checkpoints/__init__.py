"""Models of real size, made from published configurations with seeded random weights."""
