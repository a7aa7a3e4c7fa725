import builtins
import importlib
import itertools
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from flash_attention_with_scores.heatmap import MASKED, plot_heads, plot_scores, plot_tile_order

MIXED = "visited, masked element by element"
SHAPES = [(1, 1), (6, 6), (1, 24), (4, 12), (20, 7)]


def random_scores(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def causal_visible(n_q, n_k):
    return np.tril(np.ones((n_q, n_k), dtype=bool), n_k - n_q)


def softmax(logits):
    visible = torch.from_numpy(causal_visible(*logits.shape[-2:]))
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()


def axes(fig, label):
    return next((ax for ax in fig.axes if ax.get_label() == label), None)


def drawn(ax):
    return ax.images[0].get_array()


def bars(ax):
    """Lengths and centres of a margin's bars."""
    boxes = [(bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()) for bar in ax.patches]
    x, y, width, height = np.array(boxes).T
    return (width, y + height / 2) if ax.get_label() == "row sum" else (height, x + width / 2)


def tick_texts(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_matrix_and_sums_are_drawn_cell_by_cell(n_q, n_k, causal):
    scores = random_scores(n_q, n_k).numpy()
    visible = causal_visible(n_q, n_k) if causal else np.ones((n_q, n_k), dtype=bool)
    fig = plot_scores(scores, causal=causal)
    heat, rows, columns, bar = (axes(fig, name) for name in ("heatmap", "row sum", "column sum", "colour bar"))
    np.testing.assert_array_equal(~np.ma.getmaskarray(drawn(heat)), visible)
    np.testing.assert_array_equal(drawn(heat).data[visible], scores[visible])
    np.testing.assert_allclose(heat.images[0].cmap.get_bad(), to_rgba(MASKED))
    for ax, across, count in ((rows, 1, n_q), (columns, 0, n_k)):
        lengths, centres = bars(ax)
        np.testing.assert_allclose(lengths, np.where(visible, scores, 0).sum(across), rtol=1e-12)
        np.testing.assert_allclose(centres, range(count), atol=1e-9)
    assert heat.get_xlim() == columns.get_xlim() == (-0.5, n_k - 0.5)
    assert heat.get_ylim() == rows.get_ylim() == (n_q - 0.5, -0.5)
    places = [ax.get_position() for ax in (heat, rows, columns, bar)]
    assert places[0].intervalx == pytest.approx(places[2].intervalx)
    assert places[0].intervaly == pytest.approx(places[1].intervaly)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(places, 2))


def test_sums_are_added_in_float64_unless_given():
    scores = torch.full((2, 300), 0.1, dtype=torch.float16)
    fig = plot_scores(scores, causal=False)
    np.testing.assert_allclose(bars(axes(fig, "row sum"))[0], float(scores[0, 0]) * 300, rtol=1e-12)
    row_sum, col_sum = torch.arange(5.0), torch.arange(7.0)[None, None] - 3
    fig = plot_scores(random_scores(5, 7), row_sum=row_sum, col_sum=col_sum)
    np.testing.assert_array_equal(bars(axes(fig, "row sum"))[0], row_sum)
    np.testing.assert_array_equal(bars(axes(fig, "column sum"))[0], col_sum.flatten())


def test_weights_draw_what_each_key_receives_and_no_row_of_ones():
    weights = softmax(random_scores(9, 9))
    fig = plot_scores(weights, weights=True)
    assert axes(fig, "row sum") is None
    assert axes(fig, "column sum").get_title(loc="left") == "softmax column sum (attention received)"
    np.testing.assert_allclose(bars(axes(fig, "column sum"))[0], weights.sum(0))
    assert axes(plot_scores(weights, weights=True, row_sum=torch.ones(9)), "row sum")


def test_color_scales():
    scores = random_scores(30, 30)
    scores[20, 3] = 1e4
    norm = axes(plot_scores(scores), "heatmap").images[0].norm
    assert norm.vmin == -norm.vmax
    assert norm.vmax < 10, "one outlier must not wash the picture out"
    scores[1, 5] = 1e9
    assert axes(plot_scores(scores), "heatmap").images[0].norm.vmax == norm.vmax, "masked entries do not count"
    norm = axes(plot_scores(softmax(random_scores(30, 30)), weights=True), "heatmap").images[0].norm
    assert (norm.vmin, norm.vmax) == (0, 1)
    assert norm(0.01) > 0.1, "small weights must be seen"


def test_tokens_name_queries_and_keys():
    tokens = ["The", " dog", "$5", "$x$", "\n", "antidisestablishmentarianism"]
    written = ["The", " dog", "$5", "$x$", "\\n", "antidisestablis…"]
    fig = plot_scores(random_scores(6, 6), tokens)
    heat, columns = axes(fig, "heatmap"), axes(fig, "column sum")
    assert tick_texts(heat.yaxis) == tick_texts(columns.xaxis) == written
    assert (heat.get_ylabel(), columns.get_xlabel()) == ("query", "key")
    FigureCanvasAgg(fig).draw()
    fig = plot_scores(random_scores(3, 5), list("abc"), key_tokens=list("vwxyz"), margins=False)
    assert [ax.get_label() for ax in fig.axes] == ["heatmap", "colour bar"]
    assert tick_texts(fig.axes[0].yaxis) == list("abc")
    assert tick_texts(fig.axes[0].xaxis) == list("vwxyz")
    fig = plot_scores(random_scores(3, 5), list("abc"))
    assert tick_texts(axes(fig, "column sum").xaxis) == list("01234")


@pytest.mark.parametrize(("count", "pattern", "rotation"), [(6, "{}", 0), (24, "token{}", 90), (92, "{:02x}", 0)])
def test_every_token_is_shown_and_none_overlap(count, pattern, rotation):
    names = [pattern.format(index) for index in range(count)]
    fig = plot_scores(random_scores(count, count), names, title="A title " * 30)
    labels = axes(fig, "heatmap").get_yticklabels(), axes(fig, "column sum").get_xticklabels()
    renderer = FigureCanvasAgg(fig).get_renderer()
    fig.draw(renderer)
    for texts in labels:
        assert [text.get_text() for text in texts] == names
        boxes = [text.get_window_extent(renderer) for text in texts]
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
    assert {text.get_rotation() for text in labels[1]} == {rotation}, "short names are upright"
    whole, page = fig.get_tightbbox(renderer), fig.get_size_inches()
    assert min(whole.x0, whole.y0) >= 0
    assert whole.x1 <= page[0]
    assert whole.y1 <= page[1]


def test_long_sequences_are_thinned():
    fig = plot_scores(random_scores(1, 300), key_tokens=[f"token{i}" for i in range(300)])
    positions = axes(fig, "column sum").get_xticks()
    assert 20 <= len(positions) <= 100
    assert tick_texts(axes(fig, "column sum").xaxis) == [f"token{i}" for i in positions]


def test_not_finite_entries_are_hatched_and_break_nothing():
    scores = random_scores(6, 6)
    clean = axes(plot_scores(scores), "heatmap").images[0].norm.vmax
    scores[5, 1], scores[5, 2], scores[3, 0], scores[0, 5] = torch.nan, torch.inf, -torch.inf, torch.nan
    fig = plot_scores(scores)
    heat = axes(fig, "heatmap")
    assert 0 < heat.images[0].norm.vmax <= clean
    (hatched,) = (item for item in heat.collections if item.get_hatch())
    cells = [tuple(path.vertices[:4].mean(0)[::-1]) for path in hatched.get_paths()]
    assert cells == [(3, 0), (5, 1), (5, 2)], "masked cells are not reported"
    assert "(3)" in axes(fig, "column sum").get_xlabel()
    np.testing.assert_array_equal(np.isfinite(bars(axes(fig, "row sum"))[0]), [1, 1, 1, 0, 1, 0])
    assert np.isfinite(axes(fig, "row sum").get_xlim()).all()
    for everything in (torch.full((3, 3), torch.nan), torch.zeros(3, 3)):
        FigureCanvasAgg(plot_scores(everything)).draw()
        FigureCanvasAgg(plot_scores(everything, weights=True)).draw()


def test_visible_replaces_causal_and_highlight_outlines_cells():
    scores, visible = random_scores(5, 8), torch.rand(5, 8) > 0.5
    fig = plot_scores(scores, visible=visible, highlight=[(4, 1), (2, 0)])
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn(axes(fig, "heatmap"))), ~visible.numpy())
    np.testing.assert_allclose(bars(axes(fig, "column sum"))[0], scores.masked_fill(~visible, 0).sum(0))
    frames = axes(fig, "heatmap").patches
    assert [(frame.get_y() + 0.5, frame.get_x() + 0.5) for frame in frames] == [(4, 1), (2, 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64])
def test_any_number_type_and_batch_of_one(dtype):
    scores = (2 * random_scores(1, 1, 4, 4)).to(dtype)
    if dtype == torch.float32:
        scores.requires_grad_()
    expected = scores.detach().to(torch.float64)[0, 0].numpy()
    fig = plot_scores(scores, causal=False, margins=False)
    np.testing.assert_array_equal(drawn(fig.axes[0]).data, expected)


Z = torch.zeros
BAD_INPUT = [
    (ValueError, r"scores.*\[3\]", plot_scores, [Z(3)], {}),
    (ValueError, r"scores.*\[2, 1, 3, 3\]", plot_scores, [Z(2, 1, 3, 3)], {}),
    (ValueError, r"scores.*\[0, 4\]", plot_scores, [Z(0, 4)], {}),
    (TypeError, "scores.*bool", plot_scores, [Z(3, 3).bool()], {}),
    (TypeError, "scores.*complex", plot_scores, [np.ones((3, 3), dtype=complex)], {}),
    (TypeError, "scores.*list", plot_scores, [[[1.0]]], {}),
    (ValueError, "scores.*negative", plot_scores, [Z(3, 3) - 1], {"weights": True}),
    (ValueError, "tokens.*3.*4", plot_scores, [Z(3, 4), list("abcd")], {}),
    (ValueError, "key_tokens.*4.*3", plot_scores, [Z(3, 4)], {"key_tokens": list("abc")}),
    (TypeError, "tokens", plot_scores, [Z(3, 4), "abc"], {}),
    (ValueError, r"row_sum.*\[3\].*\[4\]", plot_scores, [Z(3, 4)], {"row_sum": Z(4)}),
    (ValueError, r"col_sum.*\[4\].*\[3\]", plot_scores, [Z(3, 4)], {"col_sum": Z(3)}),
    (ValueError, r"visible.*\[3, 4\].*\[4, 3\]", plot_scores, [Z(3, 4)], {"visible": Z(4, 3).bool()}),
    (TypeError, "visible.*float32", plot_scores, [Z(3, 4)], {"visible": Z(3, 4)}),
    (TypeError, "visible.*list", plot_scores, [Z(3, 4)], {"visible": [[True]]}),
    (ValueError, r"highlight.*\(3, 0\)", plot_scores, [Z(3, 4)], {"highlight": [(3, 0)]}),
    (TypeError, "highlight", plot_scores, [Z(3, 4)], {"highlight": [(0.5, 0)]}),
    (ValueError, r"weights_or_scores.*\[3, 4\]", plot_heads, [Z(3, 4)], {}),
    (ValueError, r"weights_or_scores.*\[0, 3, 4\]", plot_heads, [Z(0, 3, 4)], {}),
    (ValueError, "titles.*2.*1", plot_heads, [Z(2, 3, 3)], {"titles": ["a"]}),
    (ValueError, "columns.*0", plot_heads, [Z(2, 3, 3)], {"columns": 0}),
    (ValueError, "tokens.*3.*2", plot_heads, [Z(2, 3, 3), list("ab")], {}),
    (ValueError, "block_m.*0", plot_tile_order, [[], 4, 4, 0, 2], {}),
    (TypeError, "n_q.*4.5", plot_tile_order, [[], 4.5, 4, 2, 2], {}),
    (ValueError, r"visits.*\(1, 0\)", plot_tile_order, [[(1, 0)], 4, 4, 2, 2], {}),
    (ValueError, r"visits.*\(0, 4\)", plot_tile_order, [[(0, 4)], 4, 4, 2, 2], {}),
    (TypeError, "visits", plot_tile_order, [[0, 2], 4, 4, 2, 2], {}),
]


@pytest.mark.parametrize(("error", "message", "plot", "args", "options"), BAD_INPUT)
def test_bad_input_is_named(error, message, plot, args, options):
    with pytest.raises(error, match=message):
        plot(*args, **options)


@pytest.mark.parametrize("weights", [False, True])
def test_heads_share_one_scale(weights):
    logits = random_scores(2, 3, 5, 5) * torch.arange(1.0, 7).view(2, 3, 1, 1)
    values = softmax(logits) if weights else logits
    fig = plot_heads(values, weights=weights, suptitle="All heads")
    *heads, bar = fig.axes
    assert bar.get_label() == "colour bar"
    assert [head.get_title() for head in heads] == [f"layer {i} head {j}" for i in range(2) for j in range(3)]
    assert len({id(head.images[0].norm) for head in heads}) == 1
    for head, expected in zip(heads, values.flatten(0, 1).numpy(), strict=True):
        np.testing.assert_array_equal(np.ma.getmaskarray(drawn(head)), ~causal_visible(5, 5))
        np.testing.assert_array_equal(drawn(head).compressed(), expected[causal_visible(5, 5)])
        assert not tick_texts(head.xaxis)
    FigureCanvasAgg(fig).draw()


def test_heads_of_one_layer_name_tokens_at_the_edge_of_the_grid():
    for shape in ((5, 3, 3), (1, 5, 3, 3)):
        fig = plot_heads(random_scores(*shape), list("abc"), weights=False, columns=3)
        heads = fig.axes[:-1]
        assert [head.get_title() for head in heads] == [f"head {i}" for i in range(5)]
        assert len({round(head.get_position().x0, 6) for head in heads}) == 3
        assert len({round(head.get_position().y0, 6) for head in heads}) == 2
        assert [bool(tick_texts(head.yaxis)) for head in heads] == [True, False, False, True, False]
        assert [bool(tick_texts(head.xaxis)) for head in heads] == [False, False, True, True, True]
    fig = plot_heads(random_scores(2, 60, 60), ["token"] * 60, weights=False)
    assert not any(tick_texts(head.yaxis) for head in fig.axes[:-1]), "too many to read"


def numbers_of(fig):
    return [text for text in axes(fig, "tiles").texts if text.get_text()[:1].isdigit()]


def tiles_of(fig):
    """(q_start, k_start, q_stop, k_stop) of the drawn tiles of each kind, with their colours."""
    found = {}
    for collection in axes(fig, "tiles").collections:
        assert isinstance(collection, PolyCollection)
        corners = [path.vertices for path in collection.get_paths()]
        boxes = [(*points.min(0)[::-1].astype(int), *points.max(0)[::-1].astype(int)) for points in corners]
        found[collection.get_label()] = dict(zip(boxes, map(tuple, collection.get_facecolors()), strict=True))
    return found


@pytest.mark.parametrize(("n_q", "n_k"), [(100, 100), (40, 100), (100, 40), (1, 70)])
def test_tile_order_draws_every_tile_once_at_its_true_size(n_q, n_k):
    block_m, block_n = 16, 32
    starts = [(q, k) for q in range(0, n_q, block_m) for k in range(0, n_k, block_n)]
    visible = causal_visible(n_q, n_k)
    visits = [(q, k) for q, k in starts if visible[q : q + block_m, k : k + block_n].any()]
    fig = plot_tile_order(iter(visits), n_q, n_k, block_m, block_n, title="Forward")
    found = tiles_of(fig)
    assert sum(map(len, found.values())) == len(starts)
    covered = np.zeros((n_q, n_k), dtype=int)
    for kind, tiles in found.items():
        for (q, k, q_stop, k_stop), color in tiles.items():
            tile = visible[q:q_stop, k:k_stop]
            covered[q:q_stop, k:k_stop] += 1
            assert kind == ("skipped" if not tile.any() else "visited" if tile.all() else MIXED)
            assert (color == to_rgba(MASKED)) == (kind == "skipped")
    assert (covered == 1).all()
    numbers = {(text.get_position(), text.get_text()) for text in numbers_of(fig)}
    assert len(numbers) == len(visits)
    for number, (q, k) in enumerate(visits, 1):
        centre = ((k + min(k + block_n, n_k)) / 2, (q + min(q + block_m, n_q)) / 2)
        assert (centre, str(number)) in numbers
    hatched = {item.get_label(): bool(item.get_hatch()) for item in axes(fig, "tiles").collections}
    assert hatched == {kind: kind == MIXED for kind in found}
    FigureCanvasAgg(fig).draw()


def test_tile_order_colors_follow_the_order_and_repeats_show():
    found = tiles_of(plot_tile_order([(2, 0), (0, 0), (0, 2), (2, 2)], 4, 4, 2, 2, causal=False))
    assert list(found) == ["visited"]
    cmap = matplotlib.colormaps["viridis"]
    assert found["visited"][2, 0, 4, 2] == cmap(0.0)
    assert found["visited"][2, 2, 4, 4] == cmap(1.0)
    fig = plot_tile_order([(0, 0), (0, 0)], 4, 4, 2, 2)
    assert [text.get_text() for text in numbers_of(fig)] == ["1, 2"]
    assert len(tiles_of(plot_tile_order([], 4, 4, 2, 2))["skipped"]) == 4
    many = plot_tile_order([(q, 0) for q in range(401)], 401, 1, 1, 1, causal=False)
    assert not numbers_of(many), "unreadable"
    assert len(tiles_of(many)["visited"]) == 401


def test_figures_need_no_display_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    settings = dict(matplotlib.rcParams)
    figures = [
        plot_scores(random_scores(4, 4)),
        plot_heads(random_scores(2, 4, 4), weights=False),
        plot_tile_order([(0, 0)], 4, 4, 2, 2),
    ]
    for number, fig in enumerate(figures):
        assert type(fig) is Figure
        fig.savefig(tmp_path / f"{number}.png")
        width, height = np.round(fig.get_size_inches() * 150)
        pixels = matplotlib.image.imread(tmp_path / f"{number}.png").shape
        assert abs(pixels[0] - height) <= 1
        assert abs(pixels[1] - width) <= 1
    assert dict(matplotlib.rcParams) == settings
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    name = "flash_attention_with_scores.heatmap"
    for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'flash-attention-with-scores\[heatmap\]'"):
        importlib.import_module(name)
