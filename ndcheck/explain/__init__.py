"""Why bits differ: which op introduces the difference (trace), in which order it adds (order)."""
