"""Pure functions on samples: counts, first divergences, the divergence tree, statistics."""
