"""Screens and JSON of the commands about the machine and its versions."""
