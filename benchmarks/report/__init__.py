"""Reports of benchmarks: their types and schema, reading and writing them, comparing two, and their pages."""
