"""One model of an SGLang runtime, and the simulator that drives it under the global scheduler."""
