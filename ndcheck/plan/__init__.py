"""What is measured and under which loads: prompts, fillers, arrivals, planted faults -> trials."""
