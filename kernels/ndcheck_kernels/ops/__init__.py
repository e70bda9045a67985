"""What an op is on any device: its schema, its forms, and what a device registers for it."""
