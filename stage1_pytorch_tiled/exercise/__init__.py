"""Stage 1: attention from the definition to tiles, in plain PyTorch."""

from pathlib import Path

# Modules that are not in this folder (dense, philox, second_pass) are given. Python finds the stage's own file then,
# and imports it as a part of this package: its relative imports bring in the functions of this folder, yours.
__path__.append(str(Path(__file__).parent.parent))
