"""What help and usage errors say of a command line."""
