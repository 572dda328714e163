"""The OpenAI-compatible server over a fleet.

connection ─► app.py ─► relay.py ─► the fleet's dispatcher ─► a runtime's HTTP API
                │           └ prompts.py (token ids) · programs.py (whose call) · sse_tail.py (usage)
                └ admission.py (how many at once, whose turn) · tenants.py (keys) · metrics.py
"""
