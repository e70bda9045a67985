"""What ndcheck's own parts cost and find: the client, the statistics, explain."""
