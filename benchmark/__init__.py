"""Measurements: what the compiler makes of each kernel and, on a GPU, how fast it runs."""
