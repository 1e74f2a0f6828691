"""Stage 2: the spatial-Mamba corrector."""
