"""Ops beside torch's: products, attention, rows, experts."""
