"""Stage 3: attention that also returns its scores and their sums."""
