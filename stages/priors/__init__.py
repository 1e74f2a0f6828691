"""Stage 1: regions, embeddings, tone operators, pseudo-ground-truth."""
