"""What each program is run on in tests: rows, and a scripted model that takes every branch.

A story has `PROGRAM`, `ROWS`, `answers(request, prompt)` and `STATIC`: whether what is called does not
depend on what is generated.
"""
