"""How a server is asked, and what it answered: bytes, events, one answer; all of it untrusted."""
