"""Modules that compute row by row, in fewer launches and with the bits of their own ops."""
