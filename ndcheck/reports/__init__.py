"""Renderers of a finished run: pure functions, and one module that writes files."""
