"""Samples from a running server through the OpenAI API, under a load that ndcheck makes."""
