"""In which order an op adds, read from outside."""
