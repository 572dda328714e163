"""One script per published number; each prints a readable table and, last, one line of JSON."""
