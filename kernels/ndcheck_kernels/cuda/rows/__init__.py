"""Ops on rows, each reduced by itself."""
