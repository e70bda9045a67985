"""What the reports say in words: claims, remedies, and the command that repeats a run."""
