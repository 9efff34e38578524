"""Single measurements, each a program of its own, and the check of a machine with a GPU."""
