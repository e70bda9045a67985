"""Attention, and what prepares its operands."""
