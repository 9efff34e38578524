"""Contenders in turn, each in a process of its own."""
