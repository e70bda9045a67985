"""What explanations found, as text and as JSON values, and what of them a run's directory keeps."""
