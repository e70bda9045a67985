"""Samplers run a trial and return its samples; the rest of ndcheck sees only the protocol."""
