"""Calibration: what text goes in, what reaches each layer, what is remembered of it."""
