"""What the commands of the command line do."""

GC_THRESHOLDS = (50_000, 20, 20)
"""The scheduler makes no cyclic garbage but many small objects: Python's defaults look for it too often."""
