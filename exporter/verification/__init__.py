"""Comparing exported graphs with torch."""
