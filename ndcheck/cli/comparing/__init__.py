"""Another computer beside what was recorded: scores of a run, and a second server."""
