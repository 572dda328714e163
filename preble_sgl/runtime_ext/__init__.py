"""Runtimes: launch real SGLang, talk to it, and what it needs on a machine without a GPU."""
