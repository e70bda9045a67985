"""Processes beside this one: the second arm of a run, and compilers."""
