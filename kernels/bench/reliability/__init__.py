"""Damaged files, odd command lines, spoilt answers, kill -9."""
