"""Samples from a model in this process, under exactly the batch that a trial asks for."""
