"""Probes, each against loops and hooks written by hand, on GPT-2 (Conv1D) and Llama (Linear)."""

import gc
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from editkit.activations import probes
from editkit.activations.probes import LinearProbe, activation_norms, features, fit_probe
from editkit.corpora import load_atlas
from editkit.errors import EditkitError, OutputError
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.tokens import tokenise
from editkit.nethook import HookError
from editkit.plots import heat_map
from editkit.testing.tiny import tiny_lm
from editkit.testing.untouched import count_hooks
from tests.hooking import TEXTS, batch_of, by_hand, sites_of

FAMILIES = ["gpt2", "llama"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lm(family: str) -> LanguageModel:
    return tiny_lm(family)


def one_by_one(lm: LanguageModel, texts: Sequence[str], sites: Sequence[str]) -> list[dict[str, Tensor]]:
    """For each text alone, unpadded and without mask or positions: {site: [tokens, d]}."""
    rows = []
    for text in texts:
        with torch.no_grad(), by_hand(lm.model, sites) as seen:
            lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]]))
        rows.append({site: h[0] for site, h in seen.items()})
    return rows


# Seeing activations


def test_norms_are_those_of_plain_hooks(lm: LanguageModel, family: str) -> None:
    sites = sites_of(family)
    norms = activation_norms(lm, TEXTS[0], sites)
    (alone,) = one_by_one(lm, TEXTS[:1], sites)
    assert norms.sites == tuple(sites) and norms.values.dtype == torch.float32
    assert norms.values.shape == (3, len(norms.tokens)) == (3, len(lm.tokenizer(TEXTS[0])["input_ids"]))
    for row, site in enumerate(sites):
        for column, h in enumerate(alone[site]):
            assert norms.values[row, column].item() == pytest.approx(sum(x * x for x in h.tolist()) ** 0.5, rel=1e-5)
    assert "".join(norms.tokens).replace("<s>", "").replace(" ", "") == TEXTS[0].replace(" ", "")


def test_looking_saves_nothing_for_backward_and_changes_no_switch(
    lm: LanguageModel, family: str, tmp_path: Path
) -> None:
    switches = [m.training for m in lm.model.modules()], [p.requires_grad for p in lm.model.parameters()]
    saved: list[Tensor] = []

    def save(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with saved_tensors_hooks(save, lambda t: t):
        lm.model(**batch_of(lm))
        assert saved  # the counter counts
        saved.clear()
        activation_norms(lm, TEXTS[0], sites_of(family))
        features(lm, TEXTS, sites_of(family), path=tmp_path / "f.parquet")
    assert not saved and torch.is_grad_enabled()
    assert switches == ([m.training for m in lm.model.modules()], [p.requires_grad for p in lm.model.parameters()])
    assert count_hooks(lm.model) == 0


def test_a_site_without_one_vector_a_token_is_refused() -> None:
    with pytest.raises(EditkitError, match=r"'model.layers.0.self_attn.q_norm' is \[1, \d+, 4, 8\]"):
        activation_norms(tiny_lm("qwen3"), TEXTS[0], "model.layers.0.self_attn.q_norm")
    with pytest.raises(HookError, match="did you mean"):
        activation_norms(tiny_lm("llama"), TEXTS[0], "model.layers.0.mpl")


def test_heat_map_is_a_picture_whatever_the_tokens(tmp_path: Path) -> None:
    loaded = "matplotlib.pyplot" in sys.modules
    path = heat_map(torch.rand(2, 3), ["a", "b"], ["$x^{", " the", "\n"], tmp_path / "deep" / "p.png", title="$_")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list(path.parent.iterdir()) == [path]
    assert ("matplotlib.pyplot" in sys.modules) == loaded  # no window, no global state


def test_heat_map_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EditkitError, match="2 row and 2 column names"):
        heat_map(torch.rand(2, 3), ["a", "b"], ["x", "y"], tmp_path / "p.png")
    with pytest.raises(EditkitError, match="end the name in one of"):
        heat_map(torch.rand(1, 1), ["a"], ["x"], tmp_path / "p.xyz")
    with pytest.raises(EditkitError, match="the least value is 0: leave log out"):
        heat_map(torch.zeros(1, 1), ["a"], ["x"], tmp_path / "p.png", log=True)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EditkitError, match=r'pip install "editkit\[plots\]"'):
        heat_map(torch.rand(1, 1), ["a"], ["x"], tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


# Features


@pytest.mark.parametrize("batch_size", [3, 32])
def test_features_equal_those_of_texts_one_by_one(
    lm: LanguageModel, family: str, tmp_path: Path, batch_size: int
) -> None:
    sites, alone = sites_of(family), one_by_one(lm, TEXTS, sites_of(family))
    ints = [2, 0, -2, 1]
    if family == "llama":
        lm.tokenizer.padding_side = "left"  # what a tokenizer would do with padding must not matter
    wanted = {
        "last": [{s: h[-1] for s, h in row.items()} for row in alone],
        "mean": [{s: h.mean(0) for s, h in row.items()} for row in alone],
        "ints": [{s: h[i] for s, h in row.items()} for row, i in zip(alone, ints, strict=True)],
        "function": [{s: h[len(h) // 2] for s, h in row.items()} for row in alone],
    }
    asked: dict[str, Any] = {
        "last": "last",
        "mean": "mean",
        "ints": ints,
        "function": lambda rows, row: (rows.last(row) + 1) // 2,
    }
    for name, position in asked.items():
        path = tmp_path / f"{name}.parquet"
        made = features(lm, TEXTS, sites, path=path, position=position, columns={"text": TEXTS}, batch_size=batch_size)
        assert made.column_names == [*sites, "text"] and made["text"][:] == TEXTS
        for site in sites:
            column: Any = made.with_format("torch")[site][:]
            assert column.dtype == torch.float32 and made.features[site].length == 32
            assert torch.allclose(column, torch.stack([row[site] for row in wanted[name]]), atol=1e-5), (name, site)
    lm.tokenizer.padding_side = "right"


def test_positions_may_be_the_subjects(atlas_lm: LanguageModel, tmp_path: Path) -> None:
    subjects, template = ["Egypt", "New Zealand", "France"], "In {}, the capital city is"
    texts, site = [template.format(s) for s in subjects], "transformer.h.3"
    made = features(
        atlas_lm,
        texts,
        site,
        path=tmp_path / "f.parquet",
        position=(
            lookup_position(tokenise(atlas_lm, [t]), 0, template, s) for t, s in zip(texts, subjects, strict=True)
        ),
    )
    # A causal model's state at the subject's last token is that of the text cut there.
    alone = one_by_one(atlas_lm, [f"In {s}" for s in subjects], [site])
    column: Any = made.with_format("torch")[site][:]
    assert torch.allclose(column, torch.stack([row[site][-1] for row in alone]), atol=1e-4)


def test_features_stream(lm: LanguageModel, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is on the disk before the next one is read, so memory holds one, and no tensor outlives it."""
    monkeypatch.setattr(probes, "ROW_GROUP", 4)
    path, sizes, alive = tmp_path / "f.parquet", [], []

    def texts() -> Iterator[str]:
        for i in range(20):
            if i % 4 == 0 and i:
                (part,) = tmp_path.iterdir()
                assert part != path
                sizes.append(part.stat().st_size)
                alive.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
            yield TEXTS[i % 4]

    numbers = (i * 10 for i in range(20))
    made = features(lm, texts(), sites_of(family), path=path, columns={"n": numbers}, batch_size=4)
    assert len(set(alive)) == 1, alive
    assert len(sizes) == 4 and all(b - a > 3 * 4 * 32 * 4 for a, b in pairwise(sizes))
    assert pq.ParquetFile(path).num_row_groups == 5 and made["n"][:] == [i * 10 for i in range(20)]
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_file_and_no_half(lm: LanguageModel, family: str, tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"

    def texts() -> Iterator[str]:
        yield from TEXTS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features(lm, texts(), sites_of(family), path=path, batch_size=2)
    assert not list(tmp_path.iterdir()) and count_hooks(lm.model) == 0
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        features(lm, texts(), sites_of(family), path=path, batch_size=2)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_and_leaves_nothing(lm: LanguageModel, family: str, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(OutputError, match="could not be written"):
            features(lm, TEXTS * 5, sites_of(family), path=tmp_path / "f.parquet", batch_size=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert not list(tmp_path.iterdir())


def test_a_file_made_again_is_read_again(lm: LanguageModel, family: str, tmp_path: Path) -> None:
    path, site = tmp_path / "f.parquet", sites_of(family)[0]
    first = features(lm, TEXTS, site, path=path)[site][:]
    second = features(lm, TEXTS[::-1], site, path=path)[site][:]
    assert torch.allclose(torch.tensor(first), torch.tensor(second).flip(0), atol=1e-5)


BAD_FEATURES: dict[str, tuple[dict[str, Any], str]] = {
    "one string": ({"texts": "one text"}, "list of texts"),
    "no batch": ({"batch_size": 0}, "batch_size is 0"),
    "no text": ({"texts": []}, "there are no texts"),
    "short column": ({"columns": {"y": [1, 2]}}, "column 'y' ends after 2 rows"),
    "long column": ({"columns": {"y": range(9)}}, "texts ends after 4 rows"),
    "mixed column": ({"columns": {"y": [1, 2, "x", "y"]}, "batch_size": 2}, "not of the type they began with"),
    "strange column": ({"columns": {"y": [object()] * 4}}, "not plain"),
    "short positions": ({"position": [0]}, "position ends after 1 rows"),
    "position outside": ({"position": [0, 50, 0, 0]}, "Position 50 was asked for in 'Rain'"),
    "no such position": ({"position": "first"}, "position='first': give 'last', 'mean'"),
}


@pytest.mark.parametrize("case", BAD_FEATURES)
def test_features_say_what_is_wrong(case: str, tmp_path: Path) -> None:
    given, message = BAD_FEATURES[case]
    options: dict[str, Any] = {"texts": TEXTS} | given
    with pytest.raises(EditkitError, match=message):
        features(tiny_lm("gpt2"), sites="transformer.h.0", path=tmp_path / "f.parquet", **options)
    assert not list(tmp_path.iterdir())


def test_a_column_may_not_have_the_name_of_a_site(tmp_path: Path) -> None:
    with pytest.raises(EditkitError, match="'transformer.h.0' is a site and a given column"):
        features(tiny_lm("gpt2"), TEXTS, "transformer.h.0", path=tmp_path / "f", columns={"transformer.h.0": TEXTS})


# A linear probe


def clusters(n: int = 90, d: int = 6, seed: int = 0) -> tuple[Tensor, list[str]]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    x = torch.randn(n, d, generator=g) * torch.arange(1, d + 1) + 2.0 * nn.functional.one_hot(y, d) + 5
    return x, [("low", "mid", "top")[i] for i in y]


def test_a_probe_is_the_minimum_of_its_loss() -> None:
    x, y = clusters()
    x[:, 5] = 7.0  # constant
    probe = LinearProbe.fit(x, y, l2=0.05)
    z = (x.double() - x.double().mean(0)) / torch.tensor([*x[:, :5].double().std(0, correction=0), 1.0])
    p = (z @ probe.weight.T + probe.bias).softmax(1)
    residual = p - torch.tensor([[label == c for c in probe.classes] for label in y]).double()
    # The gradient, written out; the loss is convex, so where it is 0 is the minimum.
    assert (residual.T @ z / len(z) + 0.05 * probe.weight).abs().max() < 1e-6
    assert residual.mean(0).abs().max() < 1e-6
    assert probe.predict(x) == [probe.classes[i] for i in p.argmax(1)]
    assert probe.accuracy(x, y) == sum(a == b for a, b in zip(probe.predict(x), y, strict=True)) / 90
    assert probe.majority == max(set(y), key=y.count)
    assert torch.equal(probe.weight, LinearProbe.fit(x, y, l2=0.05).weight)


def test_probes_say_what_is_wrong() -> None:
    x, y = clusters(9)
    bad: list[tuple[Tensor, list[Any], float, str]] = [
        (x, ["a"] * 9, 0.01, "all are 'a'"),
        (x, [*y[:8], None], 0.01, "1 of 9 labels are None"),
        (x, y[:5], 0.01, "with 5 labels"),
        (x[0], y, 0.01, "Features of "),
        (x / 0, y, 0.01, "9 of 9 rows"),
        (x, y, 0.0, "must be above 0"),
    ]
    for given, labels, l2, message in bad:
        with pytest.raises(EditkitError, match=message):
            LinearProbe.fit(given, labels, l2=l2)
    with pytest.raises(EditkitError, match=r"given to a probe for \[rows, 6\]"):
        LinearProbe.fit(x, y).predict(x[:, :4])


@pytest.fixture(scope="module")
def kinds(atlas_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Every subject of the atlas once, with nothing after it: features of its last token, its kind, its continent."""
    atlas = load_atlas()
    facts = [facts[0] for facts in atlas.by_subject.values()]
    continents = {f.subject: f.object for f in atlas.by_relation["country_continent"]}
    path = tmp_path_factory.mktemp("kinds") / "kinds.parquet"
    subjects = [f.subject for f in facts]
    columns: dict[str, list[Any]] = {
        "subject": subjects,
        "kind": [f.kind for f in facts],
        "continent": [continents.get(f.subject) for f in facts],
    }
    sites = ["transformer.wte", "transformer.h.5"]
    return features(atlas_lm, subjects, sites, path=path, columns=columns, batch_size=128)


def test_a_probe_reads_kind_and_continent_off_the_atlas_model(kinds: Dataset) -> None:
    countries = kinds.select([i for i, continent in enumerate(kinds["continent"]) if continent is not None])
    for rows, label in ((kinds, "kind"), (countries, "continent")):
        result = fit_probe(rows, "transformer.h.5", label)
        assert (result.train_rows, result.test_rows) == (len(rows) - round(len(rows) / 4), round(len(rows) / 4))
        assert result.test_accuracy > 0.5 > 0.25 > result.majority_accuracy
        # Block 5 adds what the embedding of the token does not say.
        assert result.test_accuracy > fit_probe(rows, "transformer.wte", label).test_accuracy + 0.1
    # Control: labels that follow nothing in the features are not predicted.
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(1)).tolist()
    nonsense = kinds.remove_columns("kind").add_column("kind", [kinds["kind"][i] for i in order])
    assert fit_probe(nonsense, "transformer.h.5", "kind").test_accuracy < 0.25


def test_majority_accuracy_and_groups_are_counted_by_hand(kinds: Dataset) -> None:
    first = fit_probe(kinds, "transformer.h.5", "kind", seed=3, test=0.4)
    again = fit_probe(kinds.with_format("torch"), "transformer.h.5", "kind", seed=3, test=0.4)
    assert (first.test_accuracy, first.majority_accuracy) == (again.test_accuracy, again.majority_accuracy)
    assert first.majority_accuracy != fit_probe(kinds, "transformer.h.5", "kind", seed=4, test=0.4).majority_accuracy
    twice = kinds.select([*range(40), *range(40)])
    result = fit_probe(twice, "transformer.h.5", "subject", group_column="subject", test=0.5)
    # A subject is on one side only, so as a label it cannot be predicted on the other.
    assert (result.train_accuracy, result.test_accuracy, result.majority_accuracy) == (1.0, 0.0, 0.0)


def test_fit_probe_says_what_is_wrong(kinds: Dataset) -> None:
    with pytest.raises(EditkitError, match="did you mean 'kind'"):
        fit_probe(kinds, "transformer.h.5", "kinds")
    with pytest.raises(EditkitError, match="not one vector a row"):
        fit_probe(kinds, "subject", "kind")
    with pytest.raises(EditkitError, match="leaves one side empty"):
        fit_probe(kinds, "transformer.h.5", "kind", test=0.0)
