"""Reduced precision: calibration, fp32 islands, quantisation, quality gates."""
