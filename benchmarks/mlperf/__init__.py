"""MLPerf's scenarios."""
