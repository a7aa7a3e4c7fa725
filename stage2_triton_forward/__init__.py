"""Stage 2: the forward pass in Triton, from a 64×64 teaching kernel to the production loop."""
