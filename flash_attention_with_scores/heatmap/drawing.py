"""What the heatmaps are drawn with: axes placed in inches, cells, sums, tick labels and colour bars."""

import math
import textwrap
from typing import Any

import matplotlib
import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, BboxTransformFrom

INK, QUIET, MASKED, BROKEN = "#222222", "#8a8a8a", "#dcdcdc", "#a8a8a8"
POSITIVE, NEGATIVE, RECEIVED = "#b2182b", "#2166ac", "#31688e"
STYLE: dict[Any, Any] = {  # matplotlib has a type of its own for the keys
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.labelcolor": INK,
    "axes.grid": False,
    "text.color": INK,
    "text.usetex": False,
    "font.size": 9,
    "hatch.linewidth": 0.7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handleheight": 1.0,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
}
TICKS = {"length": 2, "width": 0.5, "pad": 2, "color": QUIET, "labelcolor": INK}
STRIP, BAR = 0.7, 0.14  # inches: how thick a margin and a colour bar are
LONGEST_NAME = 16


def new_figure():
    """Return an empty figure of one inch by one, so that until `fit` inches are fractions of the figure."""
    return Figure(figsize=(1, 1), dpi=150)


def add_axes(fig, label, left, top, width, height, **sharing):
    """Add axes without a frame at a place in inches, `top` counted downwards."""
    ax = fig.add_axes((left, -top - height, width, height), label=label, **sharing)
    ax.spines[:].set_visible(False)
    return ax


def fit(fig):
    """Make the figure as large as what is drawn on it, to whole pixels, which keeps cells sharp."""
    page = Bbox(np.round(fig.get_tightbbox().padded(0.12).get_points() * fig.dpi) / fig.dpi)
    places = [ax.get_position(original=True) for ax in fig.axes]
    fig.set_size_inches(page.width, page.height)
    for ax, place in zip(fig.axes, places, strict=True):
        ax.set_position(BboxTransformFrom(page).transform_bbox(place))


def add_title(ax, title, width, lift=6):
    """Write a title, `lift` points above the axes, in lines of `width` inches; its own line breaks stay."""
    lines = [textwrap.fill(line, max(24, int(width / 0.085))) for line in str(title or "").split("\n")]
    above = {"xycoords": "axes fraction", "xytext": (0, lift), "textcoords": "offset points"}
    ax.annotate("\n".join(lines), (0, 1), **above, size=11, parse_math=False)


def text_width(fig, texts, size):
    """Return the width in inches of the widest text."""
    block = fig.text(0, 0, "\n".join(texts), size=size, parse_math=False)
    width = block.get_window_extent().width / fig.dpi
    block.remove()
    return width


def round_step(least):
    """Return the smallest of 1, 2, 5, 10, 20, 50 … that is at least `least`."""
    return next(step for power in range(12) for step in (10**power, 2 * 10**power, 5 * 10**power) if step >= least)


def label_cells(axis, names, count, room):
    """Label an axis of cells, `room` inches each, by names or numbers: as many as fit at an even step."""
    size = min(9.0, max(5.6, 0.8 * 72 * room))
    labels = [str(index) for index in range(count)] if names is None else names
    labels = [label if len(label) <= LONGEST_NAME else label[: LONGEST_NAME - 1] + "…" for label in labels]
    pitch, rotation = 0.97 * size / 72, 0  # the space that a line of text needs
    if axis.axis_name == "x":
        widest = text_width(axis.get_figure(), set(labels), size)
        if names is None:
            pitch = 1.3 * widest + 0.05
        elif max(map(len, labels)) <= 2:  # a byte, or its two hexadecimal digits
            shrunk = max(4.5 / size, min(1, (room - 0.01) / max(widest, 0.01)))
            size, pitch = size * shrunk, widest * shrunk + 0.01
        elif widest + 0.06 > room:
            rotation = 90
        else:
            pitch = widest
    shown = slice(None, None, round_step(pitch / room - 1e-6))
    axis.set_ticks(range(count)[shown], labels[shown], parse_math=False)
    axis.set_tick_params(**TICKS, labelsize=size, labelrotation=rotation)


def color_scale(values, weights, name):
    """Return the colour map and norm for the visible `values`; a few extreme logits do not wash out the others."""
    values = values[np.isfinite(values)]
    if weights:
        if values.min(initial=0.0) < 0:
            raise ValueError(f"{name} must not be negative when weights=True; got {values.min():.4g}")
        norm = PowerNorm(0.4, 0.0, values.max(initial=0.0) or 1.0)
        return {"cmap": matplotlib.colormaps["viridis"].with_extremes(bad=MASKED), "norm": norm}
    cmap = matplotlib.colormaps["RdBu_r"].with_extremes(bad=MASKED)
    limit = np.abs(values).max(initial=0.0) or 1.0
    usual = np.percentile(np.abs(values), 99) if values.size else limit
    if limit > 1.5 * usual > 0:
        limit = usual
        cmap.colorbar_extend = "both"  # pyright: ignore[reportAttributeAccessIssue]  (matplotlib calls it a bool)
    return {"cmap": cmap, "norm": Normalize(-limit, limit)}


def box(q_start, k_start, q_stop, k_stop):
    """Return the corners, (x, y), of a rectangle of cells."""
    return [(k_start, q_start), (k_stop, q_start), (k_stop, q_stop), (k_start, q_stop)]


def draw_cells(ax, values, shown, scale):
    """Draw a matrix: masked cells grey, visible cells without a finite number hatched; return its image."""
    finite = np.isfinite(values)
    image = ax.imshow(np.ma.masked_array(np.where(finite, values, 0.0), ~(shown & finite)), aspect="auto", **scale)
    if not finite[shown].all():
        cells = [box(q - 0.5, k - 0.5, q + 0.5, k + 0.5) for q, k in np.argwhere(shown & ~finite)]
        ax.add_collection(
            PolyCollection(cells, facecolor=BROKEN, edgecolor=INK, lw=0, hatch="xxxxxx", aa=False), autolim=False
        )
    return image


def outline(ax, cells, line):
    """Frame cells, in a line of `line` points between two white ones."""
    for q_idx, k_idx in cells:
        frame = Rectangle((k_idx - 0.5, q_idx - 0.5), 1, 1, fill=False, ec=INK, lw=line, clip_on=False, zorder=5)
        frame.set_path_effects([withStroke(linewidth=2.2 * line, foreground="white")])
        ax.add_patch(frame)


def write_inside(ax, corners, text, cell_width, cell_height):
    """Write a text in the middle of a rectangle, as large as it fits; sizes of a cell in inches."""
    (left, top), (right, bottom) = corners[0], corners[2]
    fitting = min(1.2 * cell_width * (right - left) / len(text), 0.7 * cell_height * (bottom - top))
    size = min(10, max(3.5, 72 * fitting))
    middle = (left + right) / 2, (top + bottom) / 2
    number = ax.text(*middle, text, size=size, color="white", ha="center", va="center_baseline", zorder=4)
    number.set_path_effects([withStroke(linewidth=0.18 * size, foreground=INK)])


def draw_sums(ax, sums, weights, horizontal=False):
    """Draw one bar per cell of the axis that is shared with the heatmap; sums that are not finite get none."""
    sums = np.where(np.isfinite(sums), sums, np.nan)
    colors = np.where(sums < 0, NEGATIVE, RECEIVED if weights else POSITIVE)
    thickness = 0.82 if len(sums) <= 96 else 1.0
    (ax.barh if horizontal else ax.bar)(range(len(sums)), sums, thickness, color=colors, lw=0)
    (ax.axvline if horizontal else ax.axhline)(0, color=QUIET, lw=0.6)
    ax.margins(**{"x" if horizontal else "y": 0.04})
    axis, (low, high) = (ax.xaxis, ax.get_xlim()) if horizontal else (ax.yaxis, ax.get_ylim())
    ticks = MaxNLocator(2 if horizontal else 3, steps=[1, 2, 5, 10]).tick_values(low, high)
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_ticks([ticks[0], ticks[-1]] if horizontal else ticks)  # side by side, three numbers would touch
    axis.set_major_formatter("{x:g}")
    axis.set_tick_params(**TICKS, labelsize=7)


def color_bar(mappable, ax, label, ticks=None):
    """Draw the colour bar of an image, or of anything else coloured, on axes of its own."""
    height = ax.get_position().height
    bar = ax.figure.colorbar(mappable, cax=ax, ticks=ticks, extendfrac=0.12 / height)
    if isinstance(mappable.norm, PowerNorm):
        bar.set_ticks(ticks := _ticks_apart(mappable.norm, 0.17 / height), labels=[f"{tick:g}" for tick in ticks])
    bar.outline.set_visible(False)
    bar.minorticks_off()
    ax.tick_params(**TICKS, labelsize=8)
    bar.set_label(label, size=8)


def _ticks_apart(norm, gap):
    """Return 0 and the 1, 2, 5 × 10ⁿ up to the norm's end, from the largest down, that lie `gap` of the bar apart."""
    ticks, above = [0.0], math.inf
    power = math.floor(math.log10(norm.vmax))
    for tick in (lead * 10.0**exponent for exponent in range(power, power - 4, -1) for lead in (5, 2, 1)):
        if tick <= norm.vmax and gap < norm(tick) < above - gap:
            ticks.append(tick)
            above = norm(tick)
    return ticks
