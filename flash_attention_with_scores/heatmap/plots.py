"""The pictures: each function builds a figure out of what `drawing` draws, from what `checks` lets through."""

import itertools
import math

import numpy as np

try:
    import matplotlib
except ImportError as error:
    raise ImportError("Heatmaps need matplotlib: pip install 'flash-attention-with-scores[heatmap]'") from error
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from . import checks, drawing
from .drawing import BAR, MASKED, STRIP, STYLE

CAUSAL_BOUNDARY = "#e8590c"
MAX_NUMBERED_TILES = 400


@matplotlib.rc_context(STYLE)
def plot_scores(
    scores,
    tokens=None,
    causal=True,
    *,
    key_tokens=None,
    weights=False,
    row_sum=None,
    col_sum=None,
    title=None,
    visible=None,
    margins=True,
    highlight=None,
):
    """Draw one head's attention matrix with its tokens, row sums and column sums.

    Args:
        scores: [M, N] or [1, 1, M, N], tensor or array of any float or integer dtype, on any device.
        tokens: M strings, the queries; they name the keys too when M == N and `key_tokens` is not given.
        causal: grey out what query i cannot see: j > i + N - M. Ignored when `visible` is given.
        key_tokens: N strings, the keys.
        weights: False for signed logits, coloured around 0; True for softmax weights, on a scale that lifts small ones.
        row_sum: [M], drawn instead of the matrix's own. Weights draw no row sums unless given: each row adds up to 1.
        col_sum: [N], drawn instead of the matrix's own.
        title: text over the picture.
        visible: [M, N] bool, True = allowed.
        margins: draw the sums.
        highlight: (query, key) cells to outline.
    Returns:
        A Figure with axes labelled "heatmap", "column sum", "row sum" (where drawn) and "colour bar". Masked cells are
        grey, NaN and ±Inf hatched; a sum that meets one of those has no bar.
    Raises:
        ValueError, TypeError: an argument of the wrong shape, length, dtype or range.
    """
    values = checks.as_matrix(scores, "scores")
    n_q, n_k = values.shape
    shown = checks.causal_visible(causal, n_q, n_k) if visible is None else checks.as_visible(visible, n_q, n_k)
    query_names = checks.as_names(tokens, n_q, "tokens", "query")
    key_names = checks.as_names(key_tokens, n_k, "key_tokens", "key")
    if key_names is None and n_q == n_k:
        key_names = query_names
    cells = checks.as_pairs([] if highlight is None else highlight, "highlight")
    for q_idx, k_idx in cells:
        if not (0 <= q_idx < n_q and 0 <= k_idx < n_k):
            raise ValueError(f"highlight must hold (query, key) below ({n_q}, {n_k}); got {(q_idx, k_idx)}")
    with_rows = margins and (row_sum is not None or not weights)
    with np.errstate(invalid="ignore"):  # Inf - Inf
        seen = np.where(shown, values, 0.0)
        row_sum = seen.sum(1) if row_sum is None else checks.as_sums(row_sum, n_q, "row_sum")
        col_sum = seen.sum(0) if col_sum is None else checks.as_sums(col_sum, n_k, "col_sum")
    scale = drawing.color_scale(values[shown], weights, "scores")

    width, height = _heat_size(n_q, n_k)
    fig = drawing.new_figure()
    heat = bottom = drawing.add_axes(fig, "heatmap", 0, 0, width, height)
    image = drawing.draw_cells(heat, values, shown, scale)
    if margins:
        bottom = drawing.add_axes(fig, "column sum", 0, height + 0.22, width, STRIP, sharex=heat)
        drawing.draw_sums(bottom, col_sum, weights)
        received = "softmax column sum" + (" (attention received)" if width > 2.1 else "")
        bottom.set_title(received if weights else "column sum", loc="left", fontsize=8, pad=3)
        heat.tick_params(bottom=False, labelbottom=False)
    if with_rows:
        right = drawing.add_axes(fig, "row sum", width + 0.08, 0, STRIP, height, sharey=heat)
        drawing.draw_sums(right, row_sum, weights, horizontal=True)
        right.set_xlabel("row sum", fontsize=8, labelpad=2)
        right.tick_params(left=False, labelleft=False)
    drawing.label_cells(heat.yaxis, query_names, n_q, height / n_q)
    drawing.label_cells(bottom.xaxis, key_names, n_k, width / n_k)
    heat.set(xlim=(-0.5, n_k - 0.5), ylim=(n_q - 0.5, -0.5), ylabel="query")
    broken = int((shown & ~np.isfinite(values)).sum())
    bottom.set_xlabel(f"key\nhatched: NaN or infinite ({broken})" if broken else "key")
    x_bar = width + 0.22 + (0.08 + STRIP if with_rows else 0)
    bar = drawing.add_axes(fig, "colour bar", x_bar, 0, BAR, max(height, 1.3))
    drawing.color_bar(image, bar, "weight (softmax)" if weights else "logit")
    drawing.outline(heat, cells, line=min(1.6, max(0.8, 8 * width / n_k)))
    drawing.add_title(heat, title, x_bar + 0.6)
    drawing.fit(fig)
    return fig


@matplotlib.rc_context(STYLE)
def plot_heads(weights_or_scores, tokens=None, causal=True, *, weights=True, titles=None, columns=None, suptitle=None):
    """Draw every head's attention matrix in a grid, all on one colour scale.

    Args:
        weights_or_scores: [H, M, N], [1, H, M, N] or [L, H, M, N] (layers), tensor or array of float or integer dtype.
        tokens: M strings, the queries (and the keys when M == N), drawn at the grid's edge where they fit.
        causal: grey out what query i cannot see: j > i + N - M.
        weights: True for softmax weights, False for signed logits.
        titles: one string per head; "head 3" or "layer 0 head 3" when not given.
        columns: heads per row of the grid.
        suptitle: text over the grid.
    Returns:
        A Figure whose first axes are the heads in order; the last one is the colour bar.
    Raises:
        ValueError, TypeError: an argument of the wrong shape, length, dtype or range.
    """
    values = checks.as_numbers(weights_or_scores, "weights_or_scores")
    if values.ndim not in (3, 4) or values.size == 0:
        raise ValueError(
            "weights_or_scores must be a non-empty [H, M, N], [1, H, M, N] or [L, H, M, N]; "
            f"got shape {list(values.shape)}"
        )
    n_heads, n_q, n_k = values.shape[-3:]
    values = values.reshape(-1, n_q, n_k)
    several_layers = len(values) > n_heads
    if titles is None:
        pattern = "layer {} head {}" if several_layers else "head {1}"
        titles = [pattern.format(*divmod(index, n_heads)) for index in range(len(values))]
    titles = checks.as_names(titles, len(values), "titles", "head") or []
    names = checks.as_names(tokens, n_q, "tokens", "query")
    if columns is None:
        columns = n_heads if several_layers and n_heads <= 12 else min(8, math.ceil(math.sqrt(1.4 * len(values))))
    columns = min(checks.as_count(columns, "columns"), len(values))
    shown = checks.causal_visible(causal, n_q, n_k)
    scale = drawing.color_scale(values[:, shown], weights, "weights_or_scores")

    cell = min(2.1, max(0.95, 13 / columns)) / max(n_q, n_k)
    width, height = max(0.3, cell * n_k), max(0.3, cell * n_q)
    named = names is not None and cell >= 0.085
    gap_x, gap_y = 0.14, 0.3
    grid_w = columns * (width + gap_x) - gap_x
    grid_h = math.ceil(len(values) / columns) * (height + gap_y) - gap_y
    fig = drawing.new_figure()
    title_size = 8.5 * min(1, (width + 0.08) / drawing.text_width(fig, titles, 8.5))
    for index, (head, title) in enumerate(zip(values, titles, strict=True)):
        row, column = divmod(index, columns)
        place = column * (width + gap_x), row * (height + gap_y), width, height
        ax = drawing.add_axes(fig, f"head {index}", *place)
        drawing.draw_cells(ax, head, shown, scale)
        ax.set_title(title, fontsize=title_size, pad=3, parse_math=False)
        ax.set(xticks=[], yticks=[])
        if named and column == 0:
            drawing.label_cells(ax.yaxis, names, n_q, height / n_q)
        if named and n_q == n_k and index + columns >= len(values):
            drawing.label_cells(ax.xaxis, names, n_k, width / n_k)
    last = len(values) - 1
    top_left, bottom_left = fig.axes[0], fig.axes[last - last % columns]
    top_left.set_ylabel("query", y=1 - grid_h / 2 / height)
    bottom_left.set_xlabel("key", x=grid_w / 2 / width)
    bar = drawing.add_axes(fig, "colour bar", grid_w + 0.22, 0, BAR, min(max(grid_h, 1.3), 4))
    drawing.color_bar(top_left.images[0], bar, "weight (softmax)" if weights else "logit")
    drawing.add_title(top_left, suptitle, grid_w + 0.6, lift=20)
    drawing.fit(fig)
    return fig


@matplotlib.rc_context(STYLE)
def plot_tile_order(visits, n_q, n_k, block_m, block_n, causal=True, *, title=None):
    """Draw the score matrix cut into tiles, numbered and coloured in the order a loop took them.

    Args:
        visits: (q_start, k_start) of each tile, in the order it was taken; a tile taken twice shows both numbers.
        n_q, n_k: rows and columns of the matrix.
        block_m, block_n: rows and columns of a tile; the last ones may be cut short.
        causal: mark the tiles that hold a position with k_idx > q_idx + n_k - n_q.
        title: text over the picture.
    Returns:
        A Figure. Tiles never taken are grey; taken tiles that hold a masked position are hatched.
    Raises:
        ValueError, TypeError: a size that is not a positive integer, or a visit that is not a tile's first position.
    """
    n_q, n_k = checks.as_count(n_q, "n_q"), checks.as_count(n_k, "n_k")
    block_m, block_n = checks.as_count(block_m, "block_m"), checks.as_count(block_n, "block_n")
    visits = checks.as_pairs(visits, "visits")
    order = {}
    for number, (q_start, k_start) in enumerate(visits, 1):
        if not (0 <= q_start < n_q and 0 <= k_start < n_k) or q_start % block_m or k_start % block_n:
            raise ValueError(
                f"visits must hold (q_start, k_start) with q_start a multiple of block_m={block_m} below n_q={n_q} "
                f"and k_start a multiple of block_n={block_n} below n_k={n_k}; got {(q_start, k_start)}"
            )
        order.setdefault((q_start, k_start), []).append(number)

    n_rows, n_columns = math.ceil(n_q / block_m), math.ceil(n_k / block_n)
    scale = min(5.6, max(2.8, 0.42 * max(n_rows, n_columns))) / max(n_q, n_k)
    width, height = max(0.8, scale * n_k), max(0.5, scale * n_q)
    fig = drawing.new_figure()
    ax = drawing.add_axes(fig, "tiles", 0, 0, width, height)
    cmap, norm = matplotlib.colormaps["viridis"], Normalize(1, max(2, len(visits)))
    kinds = {"visited": [], "visited, masked element by element": [], "skipped": []}
    whole, masked, skipped = kinds.values()
    for q_start, k_start in itertools.product(range(0, n_q, block_m), range(0, n_k, block_n)):
        q_stop, k_stop = min(q_start + block_m, n_q), min(k_start + block_n, n_k)
        numbers = order.get((q_start, k_start))
        kind = skipped if not numbers else masked if causal and k_stop > q_start + n_k - n_q + 1 else whole
        corners = drawing.box(q_start, k_start, q_stop, k_stop)
        kind.append((corners, cmap(norm(numbers[0])) if numbers else MASKED))
        if numbers and n_rows * n_columns <= MAX_NUMBERED_TILES:
            drawing.write_inside(ax, corners, ", ".join(map(str, numbers)), width / n_k, height / n_q)
    line = min(1.2, 2.2 * width * block_n / n_k, 2.2 * height * block_m / n_q)
    for label, tiles in kinds.items():
        if tiles:
            corners, colors = zip(*tiles, strict=True)
            hatch = "////" if tiles is masked else None
            ax.add_collection(PolyCollection(corners, fc=colors, ec="white", lw=line, hatch=hatch, label=label))
    if causal:
        edge = np.clip(np.arange(n_q) + n_k - n_q + 1, 0, n_k)
        style = {"color": CAUSAL_BOUNDARY, "lw": 1.4, "label": "causal boundary"}
        ax.stairs(edge, range(n_q + 1), orientation="horizontal", baseline=None, **style)
    ax.set_xticks(range(0, n_k + 1, block_n * drawing.round_step(0.12 * len(str(n_k)) * n_k / block_n / width)))
    ax.set_yticks(range(0, n_q + 1, block_m * drawing.round_step(0.2 * n_q / block_m / height)))
    ax.tick_params(**drawing.TICKS, labelsize=8)
    ax.set(xlim=(0, n_k), ylim=(n_q, 0), xlabel="key", ylabel="query")
    bar = drawing.add_axes(fig, "colour bar", width + 0.22, 0, BAR, max(height, 1.0))
    whole_numbers = MaxNLocator(6, integer=True, min_n_ticks=2)
    drawing.color_bar(ScalarMappable(norm, cmap), bar, "order of visit", whole_numbers)
    drawing.add_title(ax, title, width + 0.9)
    legend = ax.legend(loc="upper left", bbox_to_anchor=(0, -0.52 / height), ncols=2 if width > 3.6 else 1)
    for tiles, sample in zip(filter(None, kinds.values()), legend.get_patches(), strict=True):
        sample.set_facecolor(MASKED if tiles is skipped else cmap(0.45))
    drawing.fit(fig)
    return fig


def _heat_size(n_q, n_k):
    """Return width and height in inches: square cells, unless a side would then be too thin to label."""
    longest = max(n_q, n_k)
    side = min(9.4, 2.4 + 0.09 * longest) if longest < 150 else 8.0
    return max(0.8, side * n_k / longest), max(0.5, side * n_q / longest)
