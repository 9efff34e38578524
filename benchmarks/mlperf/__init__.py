"""Runs of MLPerf's scenarios: its load generator in a process of its own, and a pipeline that answers its queries."""
