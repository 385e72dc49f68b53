"""Scripts that run inside an engine's own Python: one an engine, and what they share."""
