"""The scope: every aten op of a thread is judged, and computed, passed on or refused."""
