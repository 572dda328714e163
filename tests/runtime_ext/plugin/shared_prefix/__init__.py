"""Attention that reads shared prefixes once."""
