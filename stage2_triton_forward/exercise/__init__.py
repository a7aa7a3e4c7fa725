"""Stage 2: the forward pass in Triton, from a 64×64 teaching kernel to the production loop."""

from pathlib import Path

# Modules that are not in this folder (launch, split_kv, tile_config) are given. Python finds the stage's own file then,
# and imports it as a part of this package: its relative imports bring in the kernels of this folder, yours.
__path__.append(str(Path(__file__).parent.parent))
