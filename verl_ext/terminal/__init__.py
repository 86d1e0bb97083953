"""Show in the terminal where a run is."""
