"""Pictures of attention: one head's matrix with its sums, all heads side by side, and the order tiles are visited in.

Every function builds a `matplotlib.figure.Figure` of its own and returns it: no pyplot, so nothing needs a display and
nothing is kept alive. In a notebook, `%matplotlib inline` once, then the figure is the cell's value.
"""

from .plots import CAUSAL_BOUNDARY, MASKED, MAX_NUMBERED_TILES, plot_heads, plot_scores, plot_tile_order

__all__ = ["CAUSAL_BOUNDARY", "MASKED", "MAX_NUMBERED_TILES", "plot_heads", "plot_scores", "plot_tile_order"]
