"""What a benchmark found, for machines and for people: JSON that a schema describes, Markdown, one HTML page."""
