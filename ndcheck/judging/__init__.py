"""What a summary means: verdicts, rules of a gate, comparisons; all of it pure."""
