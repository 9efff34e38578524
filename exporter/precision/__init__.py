"""Reduced precision: calibration, observation of values, fp32 islands, quantisation, and quality gates."""
