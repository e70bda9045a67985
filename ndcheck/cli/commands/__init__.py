"""One file a subcommand: its options, and one call."""
