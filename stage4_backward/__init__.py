"""Stage 4: the backward pass by recomputation."""
