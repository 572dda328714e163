"""Closed-loop programs for simulations: scripts of calls, forks, joins and pauses, and a bound for them."""
