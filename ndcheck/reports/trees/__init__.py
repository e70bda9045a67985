"""The divergence tree, as lines and as trunks."""
