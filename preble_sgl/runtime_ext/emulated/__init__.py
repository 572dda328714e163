"""An emulated runtime: SGLang's HTTP API with a GPU's timing and no model behind it.

The engine model says when an iteration ends and what the KV cache holds; the real clock waits for it; the
answers are made-up words. Real routers and clients can so be raced on a laptop. Its timings are those of the
profile it runs, never a measurement of a GPU.
"""
