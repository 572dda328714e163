"""Racing OpenAI-compatible routers: runtimes that answer at once, a load, and the contenders."""
