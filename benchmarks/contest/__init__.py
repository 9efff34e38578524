"""Contests: contenders that draw the same image in turn, each in a process of its own."""
