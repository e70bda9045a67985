"""The run directory, and every file that is read as untrusted input."""
