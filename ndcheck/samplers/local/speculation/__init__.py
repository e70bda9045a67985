"""Speculative decoding in this process: what proposes the tokens that a pass verifies."""
