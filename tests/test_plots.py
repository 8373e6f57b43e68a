"""Plots: the numbers given are drawn, labels do not overlap, equal figures are equal files, and anyone can add one."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
import torch

from editkit import plots
from editkit.activations.probes import Norms
from editkit.errors import ConfigError, EditkitError
from editkit.lenses import Attention, Lens, StreamChange
from editkit.metrics.correlation import rank_correlation
from editkit.tracing import PARTS, AverageTrace, Proposal, Traced
from tests.covering import spread

LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerk"
ODD = ["$x^{", " $\\frac", "\n", " ", "\x07", "東京", "\ufffd", "_under", "%s", " the", LONG]
KINDS = ("state", "mlp", "attention", "severed_mlp", "severed_attention")


def traced(tokens: int = 6, blocks: int = 4, kinds: Sequence[str] = KINDS[:3], words: Sequence[str] = ()) -> Traced:
    draw = torch.Generator().manual_seed(tokens * blocks)
    names = [*words, *(f" token{i}" for i in range(len(words), tokens))]
    tables = {kind: 0.1 + 0.8 * torch.rand(tokens, blocks, generator=draw, dtype=torch.float64) for kind in kinds}
    return Traced(names, (1, 2), " Paris", 0.95, 0.1, 10, tables)


def averaged(facts: int = 12, blocks: int = 4, kinds: Sequence[str] = KINDS[:3]) -> AverageTrace:
    draw = torch.Generator().manual_seed(facts)
    tables = {kind: torch.rand(facts, len(PARTS), blocks, generator=draw, dtype=torch.float64) for kind in kinds}
    for table in tables.values():
        table[:, PARTS.index("middle subject tokens")] = torch.nan  # no subject has three tokens
        table[::2, PARTS.index("further tokens")] = torch.nan
    clean = torch.full((facts,), 0.9, dtype=torch.float64)
    return AverageTrace(tuple(f"fact {i}" for i in range(facts)), clean, clean - 0.7, tables, 10)


def proposal(*layers: int) -> Proposal:
    return Proposal(layers, 0.5, 0.4, 0.6, (0.1,) * 4, (0,), 0.1, 0.0, 0.2, 0.7, 0.7, 12)


def lens(depths: int = 5, words: tuple[str, ...] = ("Paris", "Rome")) -> Lens:
    p = torch.linspace(0, 1, depths * len(words), dtype=torch.float64).view(depths, len(words))
    return Lens(
        "a prompt of $ome length", words, p, torch.zeros(depths, len(words), dtype=torch.long), (" is",) * depths
    )


def probe_rows(
    kinds: Sequence[str] = (
        "rewrite",
        "paraphrase",
        "neighborhood",
        "a kind of probe that nobody has ever named before",
    ),
) -> list[dict[str, Any]]:
    sides = {"probability_new_before": 0.1, "probability_new_after": 0.9}
    sides |= {"probability_true_before": 0.8, "probability_true_after": 0.2}
    return [{"case": c, "kind": kind} | {k: v + 0.01 * c for k, v in sides.items()} for kind in kinds for c in range(3)]


def flow(sites: Sequence[str] = ("h.0", "h.1")) -> list[dict[str, Any]]:
    return [
        {"site": site, "kind": kind, "calls": 2, "rms_min": 0.1, "rms_mean": 0.2 + i, "rms_max": 9.0 + i,
         "faults": ["zero"] if i == 1 else []}
        for kind in ("forward", "backward") for i, site in enumerate(sites)
    ]  # fmt: skip


def spectra(n: int = 3) -> list[dict[str, Any]]:
    return [
        {"parameter": f"transformer.h.{i}.mlp.c_proj.weight", "singular_values": [2.0, 1e-17],
         "base_singular_values": [9.0, 5.0, 4.0]}
        for i in range(n)
    ]  # fmt: skip


def everything(
    tokens: int = 6, blocks: int = 4, heads: int = 3, words: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Each picture, by name."""
    one = traced(tokens, blocks, KINDS, words)
    names = tuple(one.tokens)
    table = torch.rand(blocks, tokens, dtype=torch.float64)
    sites = tuple(f"transformer.h.{i}.mlp" for i in range(blocks))
    average = averaged(blocks=blocks, kinds=KINDS)
    yield "trace", plots.trace_map(one)
    yield "one kind", plots.trace_map(one, ["state"])
    yield "average", plots.average_map(average, proposal=proposal(1, 2))
    yield "lines", plots.average_lines(average, proposal=proposal(1))
    yield "lines of all parts", plots.average_lines(average, parts=PARTS)
    yield "lens", plots.lens_lines(lens(blocks + 1, (*words, "Paris", LONG)), lens(blocks + 1, (*words, "Paris", LONG)))
    weights = torch.rand(blocks, heads, tokens)
    yield "attention", plots.attention_map(Attention(weights, names, (1, 2)))
    yield "stream", plots.stream_map(StreamChange(table, table / 2, names))
    points = torch.rand(50).tolist()
    yield "scatter", plots.side_effect_scatter(points, points[::-1], predicted_name=LONG * 3, measured_name=LONG * 3)
    yield "scatter, log", plots.side_effect_scatter(points, [x / 1e3 for x in points], log=True)
    yield "spectra", plots.spectra_lines(spectra(min(blocks, 7)))
    yield "probes", plots.probe_bars(probe_rows())
    yield "norms", plots.norm_map(Norms(table + 0.1, sites, names))
    yield "gradients", plots.gradient_lines(flow(sites))


def shown_texts(figure: Any) -> list[tuple[str, Any]]:
    """(text, its box in pixels) of everything that is written when the figure is painted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    written: list[tuple[str, Any]] = []
    paint = Text.draw

    def watched(text: Any, renderer: Any, *rest: Any, **named: Any) -> Any:
        if text.get_visible() and text.get_text().strip():
            written.append((text.get_text(), text.get_window_extent(renderer)))
        return paint(text, renderer, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", watched)
        FigureCanvasAgg(figure).draw()
    assert written
    return written


def overlaps(figure: Any) -> list[tuple[str, str]]:
    texts = shown_texts(figure)
    return [
        (a, b)
        for i, (a, box) in enumerate(texts)
        for b, other in texts[i + 1 :]
        if min(box.x1, other.x1) - max(box.x0, other.x0) > 0.5 and min(box.y1, other.y1) - max(box.y0, other.y0) > 0.5
    ]


@pytest.mark.parametrize(
    ("tokens", "blocks", "heads", "words"),
    spread([(12, 8, 8, ODD), (120, 48, 64, (*ODD, *(LONG + str(i) for i in range(20)))), (3, 1, 1, ())], 3),
)
def test_labels_never_overlap_nor_leave_the_figure(tokens: int, blocks: int, heads: int, words: Sequence[str]) -> None:
    for name, figure in everything(tokens, blocks, heads, words):
        assert not overlaps(figure), name
        width, height = figure.bbox.width, figure.bbox.height
        for text, box in shown_texts(figure):
            assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, (name, text)


def test_the_overlap_check_finds_one() -> None:
    figure = plots.trace_map(traced())
    figure.text(0.5, 0.5, "on top")
    figure.text(0.5, 0.5, "of it")
    assert ("on top", "of it") in overlaps(figure)


def images(figure: Any) -> list[Any]:
    return [axes.images[0] for axes in figure.axes if axes.images]


def test_a_trace_s_cells_are_its_probabilities_the_first_token_on_top() -> None:
    one = traced(words=["The", " Eiffel", " Tower"])
    figure = plots.trace_map(one)
    drawn = images(figure)
    for image, kind in zip(drawn, ("state", "mlp", "attention"), strict=True):
        assert numpy.array_equal(image.get_array(), one.probability[kind].numpy())
        assert image.get_clim() == (0.1, max(float(t.max()) for t in one.probability.values()))
    axes = drawn[0].axes
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # row 0 is on top
    assert [t.get_text() for t in axes.get_yticklabels()][:4] == ["The", "Eiffel*", "Tower*", "token3"]
    bar = next(a for a in figure.axes if not a.images)
    assert bar.get_ylabel() == "P(Paris)" and bar.get_ylim()[0] == 0.1 and bar.get_yticklabels()[0].get_text() == "0.1"
    assert "P(Paris)" in figure.get_suptitle() and "clean 0.95, corrupted 0.1" in figure.get_suptitle()


def test_average_pictures_are_the_means_and_bounds() -> None:
    average = averaged()
    figure = plots.average_map(average, proposal=proposal(1, 2))
    for image, kind in zip(images(figure), average.effect, strict=True):
        numpy.testing.assert_array_equal(numpy.ma.filled(image.get_array(), numpy.nan), average.mean(kind).numpy())
    framed = [(p.get_x(), p.get_y()) for image in images(figure) for p in image.axes.patches]
    assert set(framed) == {(0.5, 1.5), (1.5, 1.5)}  # blocks 1 and 2, the third kind of token
    figure = plots.average_lines(average, proposal=proposal(3))
    for axes, part in zip(figure.axes, ("last subject token", "last token"), strict=True):
        p = PARTS.index(part)
        curves = [line for line in axes.lines if len(line.get_xdata()) == average.layers]
        for curve, band, kind in zip(curves, axes.collections, average.effect, strict=True):
            assert list(curve.get_ydata()) == average.mean(kind)[p].tolist()
            ends = {tuple(each) for each in band.get_paths()[0].vertices.tolist()}
            for bound in average.interval(kind):
                assert set(enumerate(bound[p].tolist())) <= ends
        assert any(patch.get_x() == 2.5 and patch.get_width() == 1 for patch in axes.patches)


def test_the_scatter_s_title_is_the_rank_correlation() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(40, generator=draw)
    y = x + torch.rand(40, generator=draw)
    edits = [i // 4 for i in range(40)]
    figure = plots.side_effect_scatter([*x.tolist(), math.nan], [*y.tolist(), 1.0], [*edits, 0])
    rho, low, high = rank_correlation(x.tolist(), y.tolist(), edits)
    assert f"ρ = {rho:.2f} [{low:.2f}, {high:.2f}], 40 prompts of 10 edits" in figure.get_suptitle().replace("\n", " ")
    assert "1 without a value left out" in figure.get_suptitle().replace("\n", " ")
    assert numpy.allclose(figure.axes[0].collections[0].get_offsets(), torch.stack([x, y], 1))


def test_bars_are_means_over_cases() -> None:
    figure = plots.probe_bars(probe_rows(("rewrite",)))
    new, true = (sorted(bar.get_width() for bar in axes.patches) for axes in figure.axes[:2])
    assert new == pytest.approx([0.11, 0.91]) and true == pytest.approx([0.21, 0.81])


def test_spectra_leave_out_rounding_and_keep_it_in_the_table() -> None:
    figure = plots.spectra_lines(spectra(1))
    base, update = figure.axes[0].lines
    assert list(base.get_ydata()) == [9.0, 5.0, 4.0] and list(update.get_ydata()) == [2.0]
    assert figure.axes[0].get_yscale() == "log" and 1e-17 in set(figure.numbers.singular_value)


def test_saving_writes_the_picture_twice_and_the_numbers(tmp_path: Path) -> None:
    one = traced(words=ODD, tokens=12)
    figure = plots.trace_map(one, path=tmp_path / "deep" / "a.png")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a.csv", "a.pdf", "a.png"]
    assert (tmp_path / "deep/a.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "deep/a.pdf").read_bytes()[:4] == b"%PDF"
    read = pandas.read_csv(tmp_path / "deep/a.csv", converters={"probability": float})
    for kind, table in one.probability.items():
        some = read[read.kind == kind].pivot(index="position", columns="block", values="probability")
        assert numpy.array_equal(some.to_numpy(), table.numpy())
    assert plots.save(figure, tmp_path / "b", kinds=["pdf"]) == [tmp_path / "b.pdf"]
    assert figure._repr_png_()[:4] == b"\x89PNG"  # a notebook shows it


DRAW = """
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from tests.test_plots import everything
from editkit import plots
for name, figure in everything():
    plots.save(figure, Path(sys.argv[1]) / name.replace(" ", "-"))
assert "matplotlib.pyplot" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.slow
def test_files_are_the_same_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded = "import torch; torch.manual_seed(0)\n" + DRAW
    for seed in ("1", "2"):  # of Python's hashes
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        subprocess.run([sys.executable, "-c", seeded, str(tmp_path / seed)], check=True)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / seed).iterdir()} for seed in ("1", "2"))
    assert len(first) == 3 * 14
    assert [name for name in first if first[name] != second[name]] == []
    assert not any(b"CreationDate" in data for data in first.values())


def test_the_same_figure_is_the_same_file_twice(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        plots.lens_lines(lens(), lens(), path=tmp_path / folder / "lens")
    for name in ("lens.png", "lens.pdf", "lens.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: plots.trace_map(traced(), ["states"]), "kind 'states' was asked for; the trace has: state, mlp"),
        (lambda: plots.trace_map(traced(), []), "no kind was asked for"),
        (lambda: plots.average_lines(averaged(), parts=["verb"]), "no part 'verb'. It has: first subject token"),
        (lambda: plots.trace_map(traced(), path="x.svg"), "'x.svg': end the name in .png, .pdf or .csv"),
        (lambda: plots.save(plots.trace_map(traced()), "x", ["gif"]), "saved as 'gif'"),
        (lambda: plots.lens_lines(lens(), lens(9)), "different prompts, words or depths"),
        (lambda: plots.side_effect_scatter([1, 2, 3], [1, 2]), "3 predicted and 2 measured values"),
        (lambda: plots.side_effect_scatter([1, 2], [1, 2]), "3 or more"),
        (lambda: plots.side_effect_scatter([1, 2, 0], [1, 2, 3], log=True), "not positive: leave log out"),
        (lambda: plots.spectra_lines([]), "No spectrum was given"),
        (lambda: plots.probe_bars([{"kind": "rewrite"}]), "No probe has a probability"),
        (lambda: plots.gradient_lines([]), "has seen nothing yet"),
        (lambda: plots.trace_map(traced(tokens=2000)), "inches tall was asked for"),
    ],
)
def test_a_wrong_request_is_one_clear_error(
    ask: Callable[[], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EditkitError) as caught:
        ask()
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    draws: list[Callable[[], object]] = [
        lambda: plots.trace_map(traced()),
        lambda: plots.average_lines(averaged()),
        lambda: plots.lens_lines(lens()),
    ]
    for draw in draws:
        with pytest.raises(EditkitError, match=r'pip install "editkit\[plots\]"'):
            draw()


OUTSIDE = """
from editkit import plots
from editkit.plots.shared.canvas import blank, done

def loss_line(losses, *, path=None):
    from pandas import DataFrame
    figure = blank(3.4, 2.4)
    figure.subplots().plot(losses)
    return done(figure, DataFrame({"loss": losses}), path)

plots.register("loss_line", loss_line)
"""


def in_another_process(code: str, folder: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("installed", [True, False])
def test_another_package_adds_a_plot_without_touching_a_file(tmp_path: Path, installed: bool) -> None:
    (tmp_path / "theirs.py").write_text(OUTSIDE)
    (tmp_path / "theirs-1.dist-info").mkdir()
    (tmp_path / "theirs-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    points = "[editkit.plots]\nloss_line = theirs\n" if installed else ""
    (tmp_path / "theirs-1.dist-info" / "entry_points.txt").write_text(points)
    code = "" if installed else "import theirs; "
    code += "from editkit import plots; plots.loss_line([3.0, 1.5], path='loss'); print(*plots.names())"
    assert {"loss_line", "trace_map", "heat_map"} <= set(in_another_process(code, tmp_path))
    assert (tmp_path / "loss.csv").read_text() == "loss\n3.0\n1.5\n" and (tmp_path / "loss.png").exists()


def test_matplotlib_and_torch_are_imported_when_something_is_drawn(tmp_path: Path) -> None:
    code = "import sys; from editkit import plots; plots.trace_map\n"
    code += "print(*{'matplotlib', 'torch', 'pandas'} & {*sys.modules})"
    assert in_another_process(code, tmp_path) == []


def test_our_plots_are_registered_as_anyone_s_and_named_in_the_help() -> None:
    ours = [name for name in plots.names() if getattr(plots, name).__module__.startswith("editkit.plots.")]
    assert len(ours) == 12 and all(f"    {name} " in str(plots.__doc__) for name in ours)
    assert set(ours) <= set(dir(plots))
    with pytest.raises(AttributeError, match="no plot 'tracemap': did you mean 'trace_map'"):
        plots.tracemap  # noqa: B018


@pytest.mark.parametrize(
    ("name", "message"),
    [("trace_map", "'trace_map' is registered already"), ("save", "does not use"), ("a b", "give a Python name")],
)
def test_a_name_that_is_taken_or_cannot_be_called_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plots.register(name, lambda *, path=None: None)
