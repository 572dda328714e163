"""Measurements: one script per published number."""
