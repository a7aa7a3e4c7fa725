"""Stage 1: attention from the definition to tiles, in plain PyTorch."""
