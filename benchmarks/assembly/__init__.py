"""Reports of contests: samples summarised, stages placed under the roofline, MLPerf's runs added, files written."""
