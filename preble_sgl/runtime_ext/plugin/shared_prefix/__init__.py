"""Attention that reads a prefix once for all requests of a batch that share it, inside SGLang."""
