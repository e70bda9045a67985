"""What an exact batch generates: its steps, captured or not, what is read off them, and drafts."""
