"""Prompts: syntax, tokens, chunks, textual inversion."""
