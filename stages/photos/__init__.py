"""Photos: found, decoded upright, placed on the canvas, and written back with their metadata."""
