"""Pictures of attention: one head's matrix with its sums, all heads side by side, and the order tiles are visited in.

Every function builds a `matplotlib.figure.Figure` of its own and returns it: no pyplot, so nothing needs a display and
nothing is kept alive. In a notebook, `%matplotlib inline` once, then the figure is the cell's value.
"""

import math
import operator
import textwrap

import numpy as np
import torch

try:
    import matplotlib
    from matplotlib import patheffects
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.textpath import TextPath
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("Heatmaps need matplotlib: pip install 'flash-attention-with-scores[heatmap]'") from error

INK, QUIET, MASKED, BROKEN = "#222222", "#8a8a8a", "#dcdcdc", "#a8a8a8"
POSITIVE, NEGATIVE, RECEIVED, DIAGONAL = "#b2182b", "#2166ac", "#31688e", "#e8590c"
STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.grid": False,
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "text.color": INK,
    "text.usetex": False,
    "font.size": 9,
    "hatch.linewidth": 0.7,
}
STRIP, BAR, CAPTION = 0.7, 0.14, 0.22  # inches: a margin's thickness, the colour bar's width, a margin's caption
LEAST_WIDTH, LEAST_HEIGHT, LONGEST_SIDE = 0.8, 0.5, 9.6  # inches
MAX_NUMBERED_TILES = 400
LONGEST_NAME = 16


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
    values = _matrix(scores, "scores")
    n_q, n_k = values.shape
    shown = _visible(visible, causal, n_q, n_k)
    query_names = _names(tokens, n_q, "tokens", "query")
    key_names = _names(key_tokens, n_k, "key_tokens", "key")
    if key_names is None and n_q == n_k:
        key_names = query_names
    cells = _pairs([] if highlight is None else highlight, "highlight")
    for q_idx, k_idx in cells:
        if not (0 <= q_idx < n_q and 0 <= k_idx < n_k):
            raise ValueError(f"highlight must hold (query, key) below ({n_q}, {n_k}); got {(q_idx, k_idx)}")
    with np.errstate(invalid="ignore"):
        seen = np.where(shown, values, 0.0)
        row_sum = seen.sum(1) if row_sum is None and not weights else _vector(row_sum, n_q, "row_sum")
        col_sum = seen.sum(0) if col_sum is None else _vector(col_sum, n_k, "col_sum")
    cmap, norm, extend = _scale(values[shown], weights, "scores")
    with_rows, with_cols = margins and row_sum is not None, bool(margins)
    broken = int((shown & ~np.isfinite(values)).sum())

    width, height = _heat_size(n_q, n_k)
    down = _ticks(query_names, n_q, height / n_q, across=False)
    over = _ticks(key_names, n_k, width / n_k, across=True)
    left = max(0.42 + down["extent"], 0.62)
    x_bar = left + width + (0.08 + STRIP if with_rows else 0) + 0.22
    total_w = x_bar + BAR + 0.85
    lines = _wrapped(title, total_w - left - 0.2, 11)
    top = _below_heading(lines)
    caption = "softmax column sum (attention received)" if weights else "column sum"
    if _inches(caption, 8) > width + 0.8:
        caption = caption.replace(" (", "\n(")
    caption_h = CAPTION + 0.13 * caption.count("\n")
    under = caption_h + STRIP if with_cols else 0
    bar_h = max(height, min(1.3, height + under))
    total_h = top + max(height + under + over["extent"] + 0.4, bar_h + 0.2, height + 0.5) + (0.2 if broken else 0)

    fig = Figure(figsize=(total_w, total_h), dpi=150)
    heat = _axes(fig, "heatmap", left, top, width, height)
    _paint(heat, values, shown, cmap, norm)
    heat.set_ylabel("query")
    bottom = heat
    if with_cols:
        bottom = _axes(fig, "column sum", left, top + height + caption_h, width, STRIP, sharex=heat)
        _bars(bottom, col_sum, weights, horizontal=False)
        bottom.set_title(caption, loc="left", fontsize=8, pad=3)
        heat.tick_params(bottom=False, labelbottom=False)
    _set_ticks(bottom.xaxis, over)
    _set_ticks(heat.yaxis, down)
    bottom.set_xlabel("key")
    if with_rows:
        strip = _axes(fig, "row sum", left + width + 0.08, top, STRIP, height, sharey=heat)
        _bars(strip, row_sum, weights, horizontal=True)
        strip.set_xlabel("row sum", fontsize=8, labelpad=2)
        strip.tick_params(left=False, labelleft=False)
    heat.set(xlim=(-0.5, n_k - 0.5), ylim=(n_q - 0.5, -0.5))
    _color_bar(fig, heat.images[0], _axes(fig, "colour bar", x_bar, top, BAR, bar_h), weights, extend)
    _outline(heat, cells, min(width / n_k, height / n_q))
    _heading(fig, lines, left)
    if broken:
        note = f"hatched: {broken} {'entry is' if broken == 1 else 'entries are'} NaN or infinite"
        fig.text(left / total_w, 0.1 / total_h, note, size=8, color=INK, va="bottom")
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
    values = _numbers(weights_or_scores, "weights_or_scores")
    if values.ndim not in (3, 4) or values.size == 0:
        raise ValueError(
            "weights_or_scores must be a non-empty [H, M, N], [1, H, M, N] or [L, H, M, N]; "
            f"got shape {list(values.shape)}"
        )
    n_layers, n_heads = (1, len(values)) if values.ndim == 3 else values.shape[:2]
    n_q, n_k = values.shape[-2:]
    values = values.reshape(-1, n_q, n_k)
    names = _names(tokens, n_q, "tokens", "query")
    if titles is None:
        layers = [f"layer {layer} " if n_layers > 1 else "" for layer in range(n_layers)]
        titles = [f"{layer}head {head}" for layer in layers for head in range(n_heads)]
    titles = _names(titles, len(values), "titles", "head")
    if columns is None:
        columns = n_heads if n_layers > 1 and n_heads <= 12 else min(8, math.ceil(math.sqrt(1.4 * len(values))))
    columns = min(_count(columns, "columns"), len(values))
    shown = _visible(None, causal, n_q, n_k)
    cmap, norm, extend = _scale(values[:, shown], weights, "weights_or_scores")

    side = min(2.1, max(0.95, 13 / columns))  # the longer side of a panel, inches
    cell = side / max(n_q, n_k)
    width, height = max(0.3, cell * n_k), max(0.3, cell * n_q)
    named = names is not None and height / n_q >= 0.085 and (n_q != n_k or width / n_k >= 0.085)
    down = _ticks(names, n_q, height / n_q, across=False) if named else None
    over = _ticks(names, n_k, width / n_k, across=True) if named and n_q == n_k else None
    rows = math.ceil(len(values) / columns)
    title_size = min(8.5, 8.5 * (width + 0.08) / max(_inches(name, 8.5) for name in titles))
    left, gap_x, gap_y = 0.4 + (down["extent"] if down else 0), 0.14, 0.3
    grid_w, grid_h = columns * (width + gap_x) - gap_x, rows * (height + gap_y) - gap_y
    total_w = left + grid_w + 0.22 + BAR + 0.85
    lines = _wrapped(suptitle, total_w - left - 0.2, 11)
    top = _below_heading(lines) + 0.18
    total_h = top + max(grid_h, 1.3) + 0.36 + (over["extent"] if over else 0)

    fig = Figure(figsize=(total_w, total_h), dpi=150)
    for index, (head, title) in enumerate(zip(values, titles, strict=True)):
        row, column = divmod(index, columns)
        ax = _axes(fig, f"head {index}", left + column * (width + gap_x), top + row * (height + gap_y), width, height)
        _paint(ax, head, shown, cmap, norm)
        ax.set_title(title, fontsize=title_size, pad=3, parse_math=False)
        ax.set(xticks=[], yticks=[])
        if down and column == 0:
            _set_ticks(ax.yaxis, down)
        if over and index + columns >= len(values):
            _set_ticks(ax.xaxis, over)
    fig.text(0.16 / total_w, 1 - (top + grid_h / 2) / total_h, "query", rotation=90, ha="left", va="center")
    fig.text((left + grid_w / 2) / total_w, 0.14 / total_h, "key", ha="center", va="bottom")
    _color_bar(
        fig,
        fig.axes[0].images[0],
        _axes(fig, "colour bar", left + grid_w + 0.22, top, BAR, min(max(grid_h, 1.3), 4)),
        weights,
        extend,
    )
    _heading(fig, lines, left)
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
    n_q, n_k = _count(n_q, "n_q"), _count(n_k, "n_k")
    block_m, block_n = _count(block_m, "block_m"), _count(block_n, "block_n")
    visits = _pairs(visits, "visits")
    order = {}
    for number, (q_start, k_start) in enumerate(visits, 1):
        if not (0 <= q_start < n_q and 0 <= k_start < n_k) or q_start % block_m or k_start % block_n:
            raise ValueError(
                f"visits must hold (q_start, k_start) with q_start a multiple of block_m={block_m} below n_q={n_q} "
                f"and k_start a multiple of block_n={block_n} below n_k={n_k}; got {(q_start, k_start)}"
            )
        order.setdefault((q_start, k_start), []).append(number)
    kinds = {"skipped": [], "whole": [], "masked": []}
    for q_start in range(0, n_q, block_m):
        for k_start in range(0, n_k, block_n):
            last_k = min(k_start + block_n, n_k) - 1
            crossed = causal and last_k > q_start + n_k - n_q
            kind = "skipped" if (q_start, k_start) not in order else "masked" if crossed else "whole"
            kinds[kind].append((q_start, k_start))
    n_tiles = sum(map(len, kinds.values()))

    long_side = min(7.0, max(2.8, 0.42 * max(math.ceil(n_q / block_m), math.ceil(n_k / block_n))))
    cell = long_side / max(n_q, n_k)
    width, height = max(LEAST_WIDTH, cell * n_k), max(LEAST_HEIGHT, cell * n_q)
    left = 0.45 + _inches(str(n_q), 8)
    total_w = left + max(width, 2.6) + 0.22 + BAR + 0.75
    lines = _wrapped(title, total_w - left - 0.2, 11)
    top = _below_heading(lines)
    legend_columns = 2 if width > 3.6 else 1
    legend_rows = math.ceil((sum(map(bool, kinds.values())) + bool(causal)) / legend_columns)
    total_h = top + max(height + 0.65 + 0.18 * legend_rows, 1.2)
    fig = Figure(figsize=(total_w, total_h), dpi=150)
    ax = _axes(fig, "tiles", left, top, width, height)
    cmap, norm = matplotlib.colormaps["viridis"], Normalize(1, max(2, len(visits)))
    width_of_tile, height_of_tile = width * block_n / n_k, height * block_m / n_q
    edge = min(1.2, 2.2 * min(width_of_tile, height_of_tile))
    for kind, tiles in kinds.items():
        colors = [MASKED if kind == "skipped" else cmap(norm(order[tile][0])) for tile in tiles]
        corners = [_corners(q, k, min(q + block_m, n_q), min(k + block_n, n_k)) for q, k in tiles]
        hatch = "////" if kind == "masked" else None
        ax.add_collection(
            PolyCollection(corners, facecolors=colors, edgecolors="white", linewidths=edge, hatch=hatch, label=kind)
        )
    if n_tiles <= MAX_NUMBERED_TILES:
        for (q_start, k_start), taken in order.items():
            q_size, k_size = min(block_m, n_q - q_start), min(block_n, n_k - k_start)
            text = ", ".join(map(str, taken))
            size = max(3.5, min(10, 8 * width * k_size / n_k / _inches(text, 10), 0.7 * 72 * height * q_size / n_q))
            ax.text(
                k_start + k_size / 2,
                q_start + q_size / 2,
                text,
                size=size,
                color="white",
                ha="center",
                va="center_baseline",
                zorder=4,
                path_effects=[patheffects.withStroke(linewidth=0.18 * size, foreground=INK)],
            )
    samples = {
        "whole": Patch(facecolor=cmap(0.45), label="visited"),
        "masked": Patch(
            facecolor=cmap(0.45), edgecolor="white", hatch="/////", label="visited, masked element by element"
        ),
        "skipped": Patch(facecolor=MASKED, label="skipped"),
    }
    legend = [sample for kind, sample in samples.items() if kinds[kind]]
    if causal:
        q_edge = np.arange(n_q + 1)
        k_edge = np.clip(q_edge[:-1] + n_k - n_q + 1, 0, n_k)
        (boundary,) = ax.plot(np.repeat(k_edge, 2), np.repeat(q_edge, 2)[1:-1], color=DIAGONAL, lw=1.4)
        boundary.set_label("causal boundary")
        legend.append(boundary)
    for axis, size, block, room in (
        (ax.xaxis, n_k, block_n, 1.7 * _inches(str(n_k), 8) / width_of_tile),
        (ax.yaxis, n_q, block_m, 0.2 / height_of_tile),
    ):
        ticks = list(range(0, size + 1, block * _step(room)))
        axis.set_ticks([*ticks, size] if size - ticks[-1] >= room * block else ticks)
    ax.set(xlim=(0, n_k), ylim=(n_q, 0), xlabel="key", ylabel="query")
    ax.tick_params(length=2.5, width=0.6, color=QUIET, labelsize=8, labelcolor=INK)
    ax.spines[:].set_visible(False)
    order_map = matplotlib.cm.ScalarMappable(norm, cmap)
    bar = fig.colorbar(order_map, cax=_axes(fig, "colour bar", left + width + 0.22, top, BAR, max(height, 1.0)))
    bar.set_ticks(MaxNLocator(6, integer=True, min_n_ticks=2))
    _finish_color_bar(bar, "order of visit")
    fig.legend(
        handles=legend,
        loc="upper left",
        bbox_to_anchor=(left / total_w, 1 - (top + height + 0.52) / total_h),
        ncols=legend_columns,
        fontsize=8,
        handleheight=1.0,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
    )
    _heading(fig, lines, left)
    return fig


def _numbers(given, name):
    """A float64 array of a real tensor or array; its shape is the caller's to check."""
    if isinstance(given, torch.Tensor):
        if given.dtype == torch.bool or given.is_complex():
            raise TypeError(f"{name} must hold floats or integers; got dtype {given.dtype}")
        return given.detach().cpu().to(torch.float64).numpy()
    if not isinstance(given, np.ndarray):
        raise TypeError(f"{name} must be a torch tensor or numpy array; got {type(given).__name__}")
    if given.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold floats or integers; got dtype {given.dtype}")
    return given.astype(np.float64)


def _matrix(given, name):
    values = _numbers(given, name)
    shape = list(values.shape)
    if values.ndim == 4 and shape[:2] == [1, 1]:
        values = values[0, 0]
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{name} must be one head's non-empty [M, N] or [1, 1, M, N]; got shape {shape}")
    return values


def _vector(given, length, name):
    if given is None:
        return None
    values = _numbers(given, name)
    if values.size != length or values.shape[-1:] != (length,):
        raise ValueError(f"{name} must have shape [{length}]; got {list(values.shape)}")
    return values.reshape(length)


def _visible(given, causal, n_q, n_k):
    """[n_q, n_k] bool, True = allowed."""
    if given is None:
        return np.arange(n_k) <= np.arange(n_q)[:, None] + n_k - n_q if causal else np.ones((n_q, n_k), dtype=bool)
    if not isinstance(given, (torch.Tensor, np.ndarray)):
        raise TypeError(f"visible must be a bool tensor or array; got {type(given).__name__}")
    if given.dtype not in (torch.bool, np.bool_):
        raise TypeError(f"visible must be bool, True = allowed; got dtype {given.dtype}")
    allowed = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else given
    if allowed.shape not in ((n_q, n_k), (1, 1, n_q, n_k)):
        raise ValueError(f"visible must have the scores' shape [{n_q}, {n_k}]; got {list(allowed.shape)}")
    return allowed.reshape(n_q, n_k)


def _names(given, count, name, what):
    """The strings of `given`, control characters escaped so that each stays on its line."""
    if given is None:
        return None
    if isinstance(given, str):
        raise TypeError(f"{name} must be a list of strings, one per {what}; got one string")
    names = [str(item) for item in given]
    if len(names) != count:
        raise ValueError(f"{name} must name {count} {what} positions, one string each; got {len(names)}")
    return ["".join(char if char.isprintable() else repr(char)[1:-1] for char in item) for item in names]


def _pairs(given, name):
    try:
        return [(operator.index(first), operator.index(second)) for first, second in given]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a list of pairs of integers; got {given!r:.80}") from error


def _count(given, name):
    try:
        count = operator.index(given)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer; got {given!r}") from error
    if count < 1:
        raise ValueError(f"{name} must be at least 1; got {count}")
    return count


def _scale(values, weights, name):
    """The colour map, its limits from the visible finite `values`, and the side on which colours are cut off."""
    values = values[np.isfinite(values)]
    if weights:
        if values.size and values.min() < 0:
            raise ValueError(f"{name} must not be negative when weights=True; got {values.min():.4g}")
        limit = values.max(initial=0.0) or 1.0
        return matplotlib.colormaps["viridis"], PowerNorm(0.4, 0.0, limit), "neither"
    size = np.abs(values)
    largest = size.max(initial=0.0)
    usual = np.percentile(size, 99) if size.size else 0.0
    limit = usual if largest > 1.5 * usual > 0 else largest or 1.0
    return matplotlib.colormaps["RdBu_r"], Normalize(-limit, limit), "both" if limit < largest else "neither"


def _heat_size(n_q, n_k):
    """Width and height in inches: square cells, unless the shorter side would then be too thin to label."""
    longest = max(n_q, n_k)
    side = min(LONGEST_SIDE, 2.4 + 0.1 * longest - 0.00026 * longest**2) if longest < 150 else 8.0
    cell = side / longest
    least_width, least_height = (min(0.13 * count, 0.4 * side) for count in (n_k, n_q))
    return max(cell * n_k, least_width, LEAST_WIDTH), max(cell * n_q, least_height, LEAST_HEIGHT)


def _inches(text, size):
    return TextPath((0, 0), text.replace("$", "S"), size=size).get_extents().width / 72 if text.strip() else 0.0


def _wrapped(text, width, size):
    if text is None:
        return []
    per_line = max(8, int(width / (_inches("attention heads", size) / 15)))
    return [line for part in str(text).split("\n") for line in textwrap.wrap(part, per_line) or [""]]


def _step(least):
    """The smallest of 1, 2, 5, 10, 20, 50 … that is at least `least`."""
    return next(step for power in range(12) for step in (10**power, 2 * 10**power, 5 * 10**power) if step >= least)


def _ticks(names, count, cell, across):
    """Which positions of an axis get a label, how it is written, and the room it takes beside the axis in inches."""
    size = min(9.0, max(5.6, 0.8 * 72 * cell))
    line = 1.2 * size / 72
    labels = [str(index) for index in range(count)] if names is None else [_shortened(name) for name in names]
    widest = max(_inches(label, size) for label in ([labels[-1]] if names is None else labels))
    upright = across and names is not None and widest + 0.06 > cell
    room = 0.97 * size / 72 if upright or not across else widest
    if names is None:
        room = max(1.3 * widest + 0.05, line)
    positions = range(0, count, _step(room / cell))
    return {
        "ticks": positions,
        "labels": [labels[index] for index in positions],
        "size": size,
        "rotation": 90 if upright else 0,
        "extent": 0.06 + (widest if upright or not across else line),
    }


def _shortened(name):
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _set_ticks(axis, chosen):
    axis.set_ticks(chosen["ticks"], chosen["labels"], parse_math=False)
    axis.set_tick_params(
        length=2,
        width=0.5,
        pad=2,
        color=QUIET,
        labelcolor=INK,
        labelsize=chosen["size"],
        labelrotation=chosen["rotation"],
    )


def _axes(fig, label, left, top, width, height, **sharing):
    """Axes called `label` at a place given in inches from the figure's top left corner."""
    total_w, total_h = fig.get_size_inches()
    place = (left / total_w, 1 - (top + height) / total_h, width / total_w, height / total_h)
    return fig.add_axes(place, label=label, **sharing)


def _corners(q_start, k_start, q_stop, k_stop):
    return [(k_start, q_start), (k_stop, q_start), (k_stop, q_stop), (k_start, q_stop)]


def _paint(ax, values, shown, cmap, norm):
    """The matrix as an image: masked cells grey, visible cells without a finite number hatched."""
    finite = np.isfinite(values)
    image = np.ma.masked_array(np.where(finite, values, 0.0), mask=~(shown & finite))
    ax.imshow(image, cmap=cmap.with_extremes(bad=MASKED), norm=norm, aspect="auto")
    ax.spines[:].set_visible(False)
    edges = np.diff(np.pad(shown & ~finite, ((0, 0), (1, 1))).astype(np.int8))
    starts, stops = np.argwhere(edges == 1), np.argwhere(edges == -1)
    if len(starts):
        corners = [
            _corners(q - 0.5, start - 0.5, q + 0.5, stop - 0.5)
            for (q, start), (_, stop) in zip(starts, stops, strict=True)
        ]
        style = {"facecolors": BROKEN, "edgecolors": INK, "linewidths": 0, "hatch": "xxxxxx", "label": "not finite"}
        ax.add_collection(PolyCollection(corners, **style), autolim=False)


def _bars(ax, sums, weights, horizontal):
    """One bar per cell of the axis that is shared with the heatmap."""
    count = len(sums)
    heights = np.where(np.isfinite(sums), sums, np.nan)
    finite = sums[np.isfinite(sums)]
    low, high = finite.min(initial=0.0), finite.max(initial=0.0)
    margin = 0.04 * (high - low) or 1.0
    limits = (low - margin * (low < 0), high + margin * (high > 0 or low == 0))
    colors = np.where(heights < 0, NEGATIVE, RECEIVED if weights else POSITIVE)
    thickness = 0.82 if count <= 96 else 1.0
    draw = ax.barh if horizontal else ax.bar
    draw(np.arange(count), heights, thickness, color=colors, linewidth=0)
    line = ax.axvline if horizontal else ax.axhline
    line(0, color=QUIET, lw=0.6)
    axis = ax.xaxis if horizontal else ax.yaxis
    (ax.set_xlim if horizontal else ax.set_ylim)(*limits)
    ticks = MaxNLocator(2 if horizontal else 3, steps=[1, 2, 5, 10]).tick_values(*limits)
    ticks = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
    apart = STRIP * (ticks[1] - ticks[0]) / (limits[1] - limits[0]) if len(ticks) > 2 else STRIP
    if horizontal and apart < max(_inches(f"{tick:g}", 7) for tick in ticks) + 0.06:
        ticks = [ticks[0], ticks[-1]]
    axis.set_ticks(ticks)
    axis.set_tick_params(length=2, width=0.5, pad=2, color=QUIET, labelcolor=INK, labelsize=7)
    axis.set_major_formatter("{x:g}")
    ax.spines[:].set_visible(False)


def _color_bar(fig, image, ax, weights, extend):
    height = ax.get_position().height * fig.get_figheight()
    bar = fig.colorbar(image, cax=ax, extend=extend, extendfrac=0.12 / height)
    if weights:
        norm, ticks = image.norm, []
        power = math.floor(math.log10(norm.vmax))
        for tick in [lead * 10.0**exponent for exponent in range(power, power - 4, -1) for lead in (5, 2, 1)]:
            place = norm(min(tick, norm.vmax))
            if (
                tick <= norm.vmax * (1 + 1e-9)
                and min([place] + [norm(above) - place for above in ticks]) > 0.17 / height
            ):
                ticks.append(tick)
        bar.set_ticks([0.0, *reversed(ticks)], labels=[f"{tick:g}" for tick in [0.0, *reversed(ticks)]])
    _finish_color_bar(bar, "weight (softmax)" if weights else "logit")


def _finish_color_bar(bar, label):
    bar.outline.set_visible(False)
    bar.minorticks_off()
    bar.ax.tick_params(length=2, width=0.5, pad=2, color=QUIET, labelcolor=INK, labelsize=8)
    bar.set_label(label, size=8)


def _outline(ax, cells, cell):
    for q_idx, k_idx in cells:
        frame = Rectangle((k_idx - 0.5, q_idx - 0.5), 1, 1, fill=False, edgecolor=INK, lw=min(1.6, max(0.8, 8 * cell)))
        frame.set_path_effects([patheffects.withStroke(linewidth=2.2 * frame.get_linewidth(), foreground="white")])
        frame.set(label="highlight", clip_on=False, zorder=5)
        ax.add_patch(frame)


def _below_heading(lines):
    return 0.2 + (0.05 + 0.22 * len(lines) if lines else 0)


def _heading(fig, lines, left):
    total_w, total_h = fig.get_size_inches()
    if lines:
        text = "\n".join(lines)
        fig.text(left / total_w, 1 - 0.16 / total_h, text, size=11, va="top", linespacing=1.3, parse_math=False)
