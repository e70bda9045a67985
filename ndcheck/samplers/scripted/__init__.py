"""Samples from planted streams: for tests, for `doctor`, and to try ndcheck out."""
