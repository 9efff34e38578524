"""From what a caller gives to checked requests."""
