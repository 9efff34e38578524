"""What a run gives: results, previews, the safety checker's verdict."""
