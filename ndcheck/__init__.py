"""ndcheck measures, explains, fixes and gates nondeterminism in LLM inference."""

__version__ = "0.1.0"
