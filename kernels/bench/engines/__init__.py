"""ndcheck's arms beside vLLM's modes, in process and served."""
