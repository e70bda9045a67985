"""A server with planted faults, for tests and demonstrations, over scripted streams."""
