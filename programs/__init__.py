"""Real programs, one file each. Run one with `preble-sgl run programs/judge.py --rows rows.jsonl`."""
