"""The output of a run: its kind, results, previews, and the safety checker."""
