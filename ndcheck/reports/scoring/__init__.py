"""Recorded log-probabilities against scored ones, as they are shown."""
