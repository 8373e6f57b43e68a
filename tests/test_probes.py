"""Probes and shaping, each against loops and hooks written by hand, on GPT-2 (Conv1D) and Llama (Linear)."""

import contextlib
import copy
import gc
import resource
import signal
import sys
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from editkit import probes
from editkit.corpora import load_atlas
from editkit.errors import EditkitError, ModelError, OutputError
from editkit.facts import lookup_position
from editkit.models.tokens import tokenise
from editkit.nethook import HookError, Trace, get_module, get_parameter
from editkit.probes import LinearProbe, activation_norms, features, fit_probe
from editkit.report.plots import heat_map
from editkit.shaping import ActivationPenalty, clamp_norm, match_reference, project_off, rank_one
from tests.conftest import tiny_lm
from tests.families import SITES

FAMILIES = ["gpt2", "llama"]
TEXTS = ["The Eiffel Tower is in Paris", "Rain", "The capital of the country France is the city of", "A cloud is fog."]


def sites_of(family):
    named = SITES[family]
    return [named.block.format(1), named.mlp.format(0), named.attention.format(2)]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def lm(family):
    return tiny_lm(family)


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


@contextlib.contextmanager
def by_hand(model, sites):
    """{site: output of its last run}, through plain torch hooks."""
    seen, handles = {}, []
    for site in sites:

        def keep(module, args, output, site=site):
            seen[site] = output[0] if isinstance(output, tuple) else output

        handles.append(model.get_submodule(site).register_forward_hook(keep))
    yield seen
    for handle in handles:
        handle.remove()


def one_by_one(lm, texts, sites):
    """For each text alone, unpadded and without mask or positions: {site: [tokens, d]}."""
    rows = []
    for text in texts:
        with torch.no_grad(), by_hand(lm.model, sites) as seen:
            lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]]))
        rows.append({site: h[0] for site, h in seen.items()})
    return rows


def batch_of(lm, texts=TEXTS):
    rows = tokenise(lm, texts)
    return rows.inputs() | {"labels": rows.ids.masked_fill(rows.mask == 0, -100)}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b, tolerance=1e-6):
    assert a.keys() == b.keys() and a
    for name in a:
        assert torch.allclose(a[name], b[name], atol=tolerance, rtol=1e-4), name


# Seeing activations


def test_norms_are_those_of_plain_hooks(lm, family):
    sites = sites_of(family)
    norms = activation_norms(lm, TEXTS[0], sites)
    (alone,) = one_by_one(lm, TEXTS[:1], sites)
    assert norms.sites == tuple(sites) and norms.values.dtype == torch.float32
    assert norms.values.shape == (3, len(norms.tokens)) == (3, len(lm.tokenizer(TEXTS[0])["input_ids"]))
    for row, site in enumerate(sites):
        for column, h in enumerate(alone[site]):
            assert norms.values[row, column].item() == pytest.approx(sum(x * x for x in h.tolist()) ** 0.5, rel=1e-5)
    assert "".join(norms.tokens).replace("<s>", "").replace(" ", "") == TEXTS[0].replace(" ", "")


def test_looking_saves_nothing_for_backward_and_changes_no_switch(lm, family, tmp_path):
    switches = [m.training for m in lm.model.modules()], [p.requires_grad for p in lm.model.parameters()]
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lm.model(**batch_of(lm))
        assert saved  # the counter counts
        saved.clear()
        activation_norms(lm, TEXTS[0], sites_of(family))
        features(lm, TEXTS, sites_of(family), path=tmp_path / "f.parquet")
    assert not saved and torch.is_grad_enabled()
    assert switches == ([m.training for m in lm.model.modules()], [p.requires_grad for p in lm.model.parameters()])
    assert hooks_of(lm.model) == 0


def test_a_site_without_one_vector_a_token_is_refused():
    with pytest.raises(EditkitError, match=r"'model.layers.0.self_attn.q_norm' is \[1, \d+, 4, 8\]"):
        activation_norms(tiny_lm("qwen3"), TEXTS[0], "model.layers.0.self_attn.q_norm")
    with pytest.raises(HookError, match="did you mean"):
        activation_norms(tiny_lm("llama"), TEXTS[0], "model.layers.0.mpl")


def test_heat_map_is_a_picture_whatever_the_tokens(tmp_path):
    loaded = "matplotlib.pyplot" in sys.modules
    path = heat_map(torch.rand(2, 3), ["a", "b"], ["$x^{", " the", "\n"], tmp_path / "deep" / "p.png", title="$_")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list(path.parent.iterdir()) == [path]
    assert ("matplotlib.pyplot" in sys.modules) == loaded  # no window, no global state


def test_heat_map_says_what_is_wrong(tmp_path, monkeypatch):
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


# Losses on activations

PENALTIES = {
    "l1": ("l1", lambda h: sum(h.abs().flatten()) / h.numel()),
    "l2": ("l2", lambda h: sum((h**2).flatten()) / h.numel()),
    "own": (lambda h: h.relu().amax(-1).mean(), lambda h: h.clamp(min=0).max(-1).values.sum() / h[..., 0].numel()),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalty_gradients_equal_those_written_by_hand(lm, family, name, masked):
    sites, batch = sites_of(family)[:2], batch_of(lm)
    given, plain = PENALTIES[name]
    with ActivationPenalty(lm.model, sites, given) as penalty:
        loss = lm.model(**batch).loss
        value = penalty(batch["attention_mask"] if masked else None)
        (loss + 0.3 * value).backward()
    mine = gradients(lm.model)
    lm.model.zero_grad()
    with by_hand(lm.model, sites) as seen:
        loss = lm.model(**batch).loss
    rows = [h[batch["attention_mask"].bool()] if masked else h for h in seen.values()]
    expected = sum(plain(h) for h in rows) / len(rows)
    (loss + 0.3 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_same(mine, gradients(lm.model), 1e-5)
    assert hooks_of(lm.model) == 0


def test_an_l1_penalty_makes_activations_smaller(lm, family):
    site, batch = SITES[family].mlp.format(1), batch_of(lm)

    def trained(weight):
        model = copy.deepcopy(lm.model)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(15):
            with ActivationPenalty(model, site) as penalty:
                loss = model(**batch).loss + weight * penalty(batch["attention_mask"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with by_hand(model, [site]) as seen:
            model(**batch)
        return seen[site][batch["attention_mask"].bool()].abs().mean().item()

    assert trained(5.0) < 0.8 * trained(0.0)


def test_a_penalty_leaves_no_hook_behind_an_exception_and_takes_one_step_a_body(lm, family):
    site, batch = sites_of(family)[0], batch_of(lm)
    with pytest.raises(KeyboardInterrupt), ActivationPenalty(lm.model, site):
        raise KeyboardInterrupt
    with pytest.raises(EditkitError, match="open a new `with` for each step"), ActivationPenalty(lm.model, site) as p:
        for _ in range(2):
            lm.model(**batch)
            p()
    assert hooks_of(lm.model) == 0
    with ActivationPenalty(lm.model, site) as p:  # two runs, such as a pair of views, are one step
        lm.model(**batch)
        first = p().item()
    with p:
        lm.model(**batch)
        lm.model(input_ids=batch["input_ids"][:1])
        both = p().item()
    with p:
        lm.model(input_ids=batch["input_ids"][:1])
        assert both == pytest.approx((first + p().item()) / 2, rel=1e-5)


def test_penalties_that_cannot_be_taken_are_refused(lm, family):
    site, batch = sites_of(family)[0], batch_of(lm)
    with pytest.raises(EditkitError, match="'l1', 'l2', or a function"):
        ActivationPenalty(lm.model, site, "l3")
    with ActivationPenalty(lm.model, site, lambda h: h) as penalty:
        lm.model(**batch)
        with pytest.raises(EditkitError, match="return one number"):
            penalty()
        with pytest.raises(EditkitError, match=r"The mask is \[1, 2\]"):
            penalty(torch.ones(1, 2))


def test_distance_from_a_reference_and_its_gradients(lm, family):
    sites, batch = sites_of(family)[:2], batch_of(lm)
    model, reference = copy.deepcopy(lm.model), tiny_lm(family, seed=1).model
    graphs = []
    handle = reference.register_forward_hook(lambda module, args, out: graphs.append(out.logits.requires_grad))
    with match_reference(model, reference, sites) as distance:
        loss = model(**batch).loss
        value = distance(**batch)
        (loss + 0.1 * value).backward()
    handle.remove()
    assert graphs == [False]
    assert not gradients(reference) and hooks_of(reference) == 0 and hooks_of(model) == 0
    assert all(p.requires_grad for p in reference.parameters())
    with by_hand(lm.model, sites) as seen, by_hand(reference, sites) as wanted:
        loss = lm.model(**batch).loss
        reference(**batch)
    terms = []
    for site in sites:
        for row, length in enumerate(batch["attention_mask"].sum(1)):
            terms.append(((seen[site][row, :length] - wanted[site][row, :length].detach()) ** 2).flatten())
    expected = torch.cat(terms).mean()  # both sites have one width, so the mean of means is the mean
    (loss + 0.1 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model), gradients(lm.model), 1e-5)
    with match_reference(lm.model, copy.deepcopy(lm.model), sites) as distance:
        lm.model(**batch)
        assert distance(**batch).item() == 0


def test_references_that_would_mislead_are_refused(lm, family):
    site, batch = sites_of(family)[0], batch_of(lm)
    with pytest.raises(EditkitError, match="is the model itself"):
        match_reference(lm.model, lm.model, site)
    with pytest.raises(EditkitError, match="in training mode"):
        match_reference(lm.model, copy.deepcopy(lm.model).train(), site)
    with match_reference(lm.model, copy.deepcopy(lm.model), site) as distance:
        lm.model(**batch)
        with pytest.raises(EditkitError, match="give both the same inputs"):
            distance(input_ids=batch["input_ids"][:2])


# Features


@pytest.mark.parametrize("batch_size", [3, 32])
def test_features_equal_those_of_texts_one_by_one(lm, family, tmp_path, batch_size):
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
    asked = {"last": "last", "mean": "mean", "ints": ints, "function": lambda rows, row: (rows.last(row) + 1) // 2}
    for name, position in asked.items():
        path = tmp_path / f"{name}.parquet"
        made = features(lm, TEXTS, sites, path=path, position=position, columns={"text": TEXTS}, batch_size=batch_size)
        assert made.column_names == [*sites, "text"] and made["text"][:] == TEXTS
        for site in sites:
            column = made.with_format("torch")[site][:]
            assert column.dtype == torch.float32 and made.features[site].length == 32
            assert torch.allclose(column, torch.stack([row[site] for row in wanted[name]]), atol=1e-5), (name, site)
    lm.tokenizer.padding_side = "right"


def test_positions_may_be_the_subjects(atlas_lm, tmp_path):
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
    assert torch.allclose(made.with_format("torch")[site][:], torch.stack([row[site][-1] for row in alone]), atol=1e-4)


def test_features_stream(lm, family, tmp_path, monkeypatch):
    """A batch is on the disk before the next one is read, so memory holds one, and no tensor outlives it."""
    monkeypatch.setattr(probes, "ROW_GROUP", 4)
    path, sizes, alive = tmp_path / "f.parquet", [], []

    def texts():
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


def test_an_interrupt_leaves_the_old_file_and_no_half(lm, family, tmp_path):
    path = tmp_path / "f.parquet"

    def texts():
        yield from TEXTS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features(lm, texts(), sites_of(family), path=path, batch_size=2)
    assert not list(tmp_path.iterdir()) and hooks_of(lm.model) == 0
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        features(lm, texts(), sites_of(family), path=path, batch_size=2)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_and_leaves_nothing(lm, family, tmp_path):
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


def test_a_file_made_again_is_read_again(lm, family, tmp_path):
    path, site = tmp_path / "f.parquet", sites_of(family)[0]
    first = features(lm, TEXTS, site, path=path)[site][:]
    second = features(lm, TEXTS[::-1], site, path=path)[site][:]
    assert torch.allclose(torch.tensor(first), torch.tensor(second).flip(0), atol=1e-5)


BAD_FEATURES = {
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
def test_features_say_what_is_wrong(case, tmp_path):
    options, message = BAD_FEATURES[case]
    options = {"texts": TEXTS} | options
    with pytest.raises(EditkitError, match=message):
        features(tiny_lm("gpt2"), sites="transformer.h.0", path=tmp_path / "f.parquet", **options)
    assert not list(tmp_path.iterdir())


def test_a_column_may_not_have_the_name_of_a_site(tmp_path):
    with pytest.raises(EditkitError, match="'transformer.h.0' is a site and a given column"):
        features(tiny_lm("gpt2"), TEXTS, "transformer.h.0", path=tmp_path / "f", columns={"transformer.h.0": TEXTS})


# A linear probe


def clusters(n=90, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    x = torch.randn(n, d, generator=g) * torch.arange(1, d + 1) + 2.0 * nn.functional.one_hot(y, d) + 5
    return x, [("low", "mid", "top")[i] for i in y]


def test_a_probe_is_the_minimum_of_its_loss():
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


def test_probes_say_what_is_wrong():
    x, y = clusters(9)
    for given, labels, l2, message in [
        (x, ["a"] * 9, 0.01, "all are 'a'"),
        (x, [*y[:8], None], 0.01, "1 of 9 labels are None"),
        (x, y[:5], 0.01, "with 5 labels"),
        (x[0], y, 0.01, "Features of "),
        (x / 0, y, 0.01, "9 of 9 rows"),
        (x, y, 0.0, "must be above 0"),
    ]:
        with pytest.raises(EditkitError, match=message):
            LinearProbe.fit(given, labels, l2=l2)
    with pytest.raises(EditkitError, match=r"given to a probe for \[rows, 6\]"):
        LinearProbe.fit(x, y).predict(x[:, :4])


@pytest.fixture(scope="module")
def kinds(atlas_lm, tmp_path_factory):
    """Every subject of the atlas once, with nothing after it: features of its last token, its kind, its continent."""
    atlas = load_atlas()
    facts = [facts[0] for facts in atlas.by_subject.values()]
    continents = {f.subject: f.object for f in atlas.by_relation["country_continent"]}
    path = tmp_path_factory.mktemp("kinds") / "kinds.parquet"
    columns = {
        "subject": [f.subject for f in facts],
        "kind": [f.kind for f in facts],
        "continent": [continents.get(f.subject) for f in facts],
    }
    sites = ["transformer.wte", "transformer.h.5"]
    return features(atlas_lm, columns["subject"], sites, path=path, columns=columns, batch_size=128)


def test_a_probe_reads_kind_and_continent_off_the_atlas_model(kinds):
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


def test_majority_accuracy_and_groups_are_counted_by_hand(kinds):
    first = fit_probe(kinds, "transformer.h.5", "kind", seed=3, test=0.4)
    again = fit_probe(kinds.with_format("torch"), "transformer.h.5", "kind", seed=3, test=0.4)
    assert (first.test_accuracy, first.majority_accuracy) == (again.test_accuracy, again.majority_accuracy)
    assert first.majority_accuracy != fit_probe(kinds, "transformer.h.5", "kind", seed=4, test=0.4).majority_accuracy
    twice = kinds.select([*range(40), *range(40)])
    result = fit_probe(twice, "transformer.h.5", "subject", group_column="subject", test=0.5)
    # A subject is on one side only, so as a label it cannot be predicted on the other.
    assert (result.train_accuracy, result.test_accuracy, result.majority_accuracy) == (1.0, 0.0, 0.0)


def test_fit_probe_says_what_is_wrong(kinds):
    with pytest.raises(EditkitError, match="did you mean 'kind'"):
        fit_probe(kinds, "transformer.h.5", "kinds")
    with pytest.raises(EditkitError, match="not one vector a row"):
        fit_probe(kinds, "subject", "kind")
    with pytest.raises(EditkitError, match="leaves one side empty"):
        fit_probe(kinds, "transformer.h.5", "kind", test=0.0)


# Shaping gradients


def test_project_off_takes_away_the_span_and_nothing_else(lm, family):
    site, batch = sites_of(family)[0], batch_of(lm)
    basis = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [100.0], [0.01]])
    with Trace(lm.model, site, grads=True) as plain:
        lm.model(**batch).loss.backward()
    with Trace(lm.model, site, grads=True, edit_grad=project_off(basis)) as shaped:
        lm.model(**batch).loss.backward()
    units = basis / basis.norm(dim=1, keepdim=True)
    assert (shaped.grad @ units.T).abs().max() < 1e-6 < 1e-4 < (plain.grad @ units.T).abs().max()
    # What was taken away is in the span: least squares leaves no residual.
    taken = (plain.grad - shaped.grad).reshape(-1, 32).T.double()
    fitted = units.T.double() @ torch.linalg.lstsq(units.T.double(), taken).solution
    assert torch.allclose(fitted, taken, atol=1e-7)
    one = torch.eye(32)[5]
    assert torch.equal(project_off(one)(torch.ones(2, 32)), (1 - one).expand(2, 32))


def test_clamp_norm_shortens_what_is_too_long_and_turns_nothing(lm, family):
    site, batch = sites_of(family)[0], batch_of(lm)
    with Trace(lm.model, site, grads=True) as plain:
        lm.model(**batch).loss.backward()
    norms = plain.grad.norm(dim=-1)
    limit = norms[norms > 0].median().item()
    with Trace(lm.model, site, grads=True, edit_grad=clamp_norm(limit)) as shaped:
        lm.model(**batch).loss.backward()
    expected = plain.grad.clone()
    for row in range(norms.shape[0]):
        for token in range(norms.shape[1]):
            if norms[row, token] > limit:
                expected[row, token] *= limit / norms[row, token]
    assert torch.allclose(shaped.grad, expected, atol=1e-9, rtol=1e-5)
    assert (norms > 1.01 * limit).any() and (shaped.grad.norm(dim=-1) <= limit * (1 + 1e-6)).all()
    assert clamp_norm(1.0)(torch.zeros(2, 3, dtype=torch.bfloat16)).tolist() == [[0.0] * 3] * 2  # 0/0 is not NaN


def test_shaping_refuses_what_it_cannot_do():
    for basis in (torch.ones(2, 4), torch.zeros(1, 4), torch.eye(4)[[0, 1, 2, 3, 0]], torch.full((1, 4), torch.nan)):
        with pytest.raises(EditkitError, match="depend on each other"):
            project_off(basis)
    with pytest.raises(EditkitError, match=r"rows of 4 numbers; the gradient is \[2, 3\]"):
        project_off(torch.eye(4)[:2])(torch.ones(2, 3))
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(EditkitError, match="above 0 and finite"):
            clamp_norm(limit)


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("gpt2", "transformer.h.1.mlp.c_proj"),  # Conv1D [64, 32]
        ("gpt2", "transformer.h.1.attn.c_proj"),  # Conv1D, square: no shape tells how it lies
        ("llama", "model.layers.1.mlp.down_proj"),  # Linear [32, 64]
        ("llama", "model.layers.1.self_attn.o_proj"),  # Linear, square
    ],
)
def test_rank_one_terms_sum_to_autograds_weight_gradient(family, site):
    lm = tiny_lm(family)
    batch, other = batch_of(lm), batch_of(lm, TEXTS[:2])
    switches = [p.requires_grad for p in lm.model.parameters()]

    def loss():
        return lm.model(**batch).loss + 2 * lm.model(**other).loss

    found = rank_one(lm.model, site, loss)
    assert not gradients(lm.model) and hooks_of(lm.model) == 0
    assert switches == [p.requires_grad for p in lm.model.parameters()]
    assert len(found.keys) == len(found.grads) == batch["input_ids"].numel() + other["input_ids"].numel()
    loss().backward()
    grad = get_parameter(lm.model, f"{site}.weight").grad
    assert found.weight_grad().shape == grad.shape
    assert torch.allclose(found.weight_grad(), grad, atol=1e-6, rtol=1e-4)
    term = torch.outer(found.grads[0], found.keys[0])  # g kᵀ of the first position
    alone = type(found)(site, found.keys[:1], found.grads[:1], found.orientation).weight_grad()
    assert torch.equal(alone, term.T if found.orientation == "in_out" else term)


def test_rank_one_says_what_is_wrong(lm, family):
    batch, down = batch_of(lm), SITES[family].down_projection.format(1)
    with pytest.raises(ModelError, match="editkit edits Linear and Conv1D"):
        rank_one(lm.model, SITES[family].mlp.format(1), lambda: lm.model(**batch).loss)

    def elsewhere():
        lm.model(**batch)
        return get_parameter(lm.model, f"{down}.weight").square().sum()

    @torch.no_grad()
    def dead():
        return lm.model(**batch).loss

    for loss in (elsewhere, dead):
        with pytest.raises(EditkitError, match=f"gives '{down}' no gradient"):
            rank_one(lm.model, down, loss)
    assert hooks_of(lm.model) == 0 and get_module(lm.model, down).weight.requires_grad
