"""What is in a model's activations: their norms, activations as features for another task, and a linear probe.

Nothing here changes the model: no graph is built, training mode and `requires_grad` are not touched, and all hooks are
removed. A name that the model lacks is a HookError. For losses on activations see `shaping`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from editkit.errors import EditkitError, did_you_mean
from editkit.files import whole
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.models.tokens import Rows, tokenise
from editkit.moments import cache_folder
from editkit.nethook import Trace
from editkit.progress import Bar

if TYPE_CHECKING:
    from datasets import Dataset

Position = str | Callable[[Rows, int], int] | Iterable[int]

ROW_GROUP = 1024  # rows; the writer keeps some kB for each group, so a group for each batch would add up

_END = object()  # stands for the missing values of a stream that ended too soon


def _listed(sites: str | Iterable[str]) -> list[str]:
    return list(dict.fromkeys([sites] if isinstance(sites, str) else sites))


# Seeing activations


@dataclass(frozen=True, eq=False)
class Norms:
    """L2 norms of activations: `values` is [sites, tokens], float32 on the CPU; `sites` and `tokens` are its names."""

    values: Tensor
    sites: tuple[str, ...]
    tokens: tuple[str, ...]


@in_eval_mode
def activation_norms(lm: LanguageModel, text: str, sites: str | Iterable[str]) -> Norms:
    """L2 norm of the output of each of `sites` at each token of `text`; `editkit.plots.norm_map` draws it.

    Raises EditkitError for a site whose output is not [batch, tokens, d].
    """
    rows, outputs = _look(lm, [text], _listed(sites))
    values = torch.stack([h[0].float().norm(dim=-1).cpu() for h in outputs.values()])
    return Norms(values, tuple(outputs), tuple(str(lm.tokenizer.decode([i])) for i in rows.ids[0].tolist()))


def _look(lm: LanguageModel, texts: Sequence[str], sites: list[str]) -> tuple[Rows, dict[str, Tensor]]:
    """Run the model on `texts`: (the tokenised rows, {site: output [rows, tokens, d]})."""
    rows = tokenise(lm, texts)
    places = (rows.mask.cumsum(1) - 1).clamp(min=0)  # position ids that do not depend on the side of the padding
    with torch.no_grad(), Trace(lm.model, sites, stop=True) as trace:
        lm.model(**rows.inputs(), position_ids=places, use_cache=False)
    outputs = {site: trace[site].output for site in sites}
    for site, h in outputs.items():
        if h.ndim != 3 or h.shape[:2] != rows.ids.shape:
            raise EditkitError(
                f"The output of '{site}' is {list(h.shape)} for {list(rows.ids.shape)} [rows, tokens]: a vector at "
                "each token, [rows, tokens, d], is needed. Choose a block, an attention, an MLP or a projection."
            )
    return rows, outputs


# Features for another task


@in_eval_mode
def features(
    lm: LanguageModel,
    texts: Iterable[str],
    sites: str | Iterable[str],
    *,
    path: str | Path,
    position: Position = "last",
    columns: Mapping[str, Iterable[Any]] | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> "Dataset":
    """Activations of `texts` as a data set: for each site a column of float32 [d] with its name, and `columns`.

    - `texts`: a list or a generator, read a batch at a time. `sites`: names of modules.
    - `path`: the Parquet file to write, in row groups of 1024 rows. It has this name once it is complete.
    - `position`: "last" (each text's last token), "mean" (over its tokens, without padding), an int for each row
      (negative ones count from the row's end), or a function of (`Rows`, row) such as
      `lambda rows, row: lookup_position(rows, row, "{} is in", subject)`.
    - `columns`: {name: a value for each text}, lists or generators, copied into the data set.
    - `batch_size`: texts in one forward pass. `progress`: show a bar.

    The data set is memory-mapped from an Arrow copy in editkit's cache (`$EDITKIT_CACHE`), which a later call with the
    same `path` replaces. To move or share the data, take the Parquet file: `Dataset.from_parquet(path)`.
    Raises EditkitError for unequal lengths, positions outside a row, and column values of mixed types.
    """
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    names, columns, path = _listed(sites), dict(columns or {}), Path(path)
    # Dataset.from_parquet would make this copy too, but by reading the complete file into memory.
    copy = cache_folder() / "features" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.arrow"
    if isinstance(texts, str) or batch_size < 1:
        raise EditkitError(f"features needs a list of texts and batches of 1 or more; batch_size is {batch_size}.")
    if same := sorted(set(names) & set(columns)):
        raise EditkitError(f"features: '{same[0]}' is a site and a given column. Give the column another name.")
    with whole(path) as temporary, whole(copy) as mapped, ExitStack() as stack:
        total = len(texts) if isinstance(texts, Sized) else None
        bar = stack.enter_context(
            Bar(total=total, unit="text", desc="features", disable=not progress, delay=3, leave=False)
        )
        parquet: Any = None
        arrow: Any = None
        waiting: list[Any] = []
        for batch, places, extra in _batches(texts, position, columns, batch_size):
            # 1) a batch's vectors [rows, d] of each site
            rows, outputs = _look(lm, batch, names)
            at = None if position == "mean" else _indices(rows, position, places)
            vectors = {}
            for site, h in outputs.items():
                flat = pyarrow.array(_pooled(h, rows, at).cpu().numpy().ravel())
                vectors[site] = pyarrow.FixedSizeListArray.from_arrays(flat, h.shape[-1])
            # 2) with the given columns, a table; the first one fixes the types
            try:
                table = pyarrow.table(vectors | extra, schema=parquet and parquet.schema)
            except (pyarrow.ArrowException, TypeError) as error:
                near = f"in the rows from {batch[0][:40]!r} on"
                raise EditkitError(
                    f"features: a column's values {near} are not plain, or not of the type they began with: {error}. "
                    "Give strings, numbers or lists, of one type a column."
                ) from error
            # 3) open both files at the first batch
            if parquet is None:
                # Vectors do not repeat: a dictionary or statistics of them cost memory for each row group.
                options: dict[str, Any] = {"use_dictionary": False, "write_statistics": False}
                parquet = stack.enter_context(pyarrow.parquet.ParquetWriter(temporary, table.schema, **options))
                arrow = stack.enter_context(pyarrow.ipc.new_stream(mapped, table.schema))
            # 4) write; Parquet in row groups
            arrow.write_table(table)
            waiting.append(table)
            if sum(map(len, waiting)) >= ROW_GROUP:
                parquet.write_table(pyarrow.concat_tables(waiting))
                waiting.clear()
            bar.update(len(batch))
        if parquet is None:
            raise EditkitError("features: there are no texts, so the columns have no width. Give at least one.")
        if waiting:
            parquet.write_table(pyarrow.concat_tables(waiting))
    return Dataset.from_file(str(copy))


def _batches(
    texts: Iterable[str], position: Position, columns: dict[str, Iterable[Any]], size: int
) -> Iterator[tuple[list[str], list[int], dict[str, list[Any]]]]:
    """(texts, positions or [], columns) for each batch."""
    streams: list[tuple[str, Iterable[Any]]] = [("texts", texts), *((f"column '{c}'", columns[c]) for c in columns)]
    if not isinstance(position, str) and not callable(position):
        numbers: Any = position  # a list, a tensor, a numpy array
        streams.append(("position", numbers.tolist() if hasattr(numbers, "tolist") else numbers))
    together = zip_longest(*(stream for _, stream in streams), fillvalue=_END)
    done = 0
    while batch := list(islice(together, size)):
        for row in batch:
            if short := [name for (name, _), value in zip(streams, row, strict=True) if value is _END]:
                raise EditkitError(f"features: {short[0]} ends after {done} rows, others go on. Give equal lengths.")
            done += 1
        read = [list(values) for values in zip(*batch, strict=True)]
        places = read.pop() if len(streams) > 1 + len(columns) else []
        yield read[0], places, dict(zip(columns, read[1:], strict=True))


def _indices(rows: Rows, position: Position, places: list[int]) -> list[int]:
    """[rows]: the chosen token of each row, from 0."""
    if isinstance(position, str) and position != "last":
        raise EditkitError(f"position={position!r}: give 'last', 'mean', an int for each row, or a function.")
    chosen = []
    for row, text in enumerate(rows.texts):
        length = rows.last(row) + 1
        at = places[row] if places else position(rows, row) if callable(position) else length - 1
        if not isinstance(at, int) or not -length <= at < length:
            raise EditkitError(f"Position {at!r} was asked for in {text[:60]!r}, which has {length} tokens.")
        chosen.append(at % length)
    return chosen


def _pooled(h: Tensor, rows: Rows, at: list[int] | None) -> Tensor:
    """[rows, d] in float32 from `h` [rows, tokens, d]: at positions `at` [rows], or the mean over tokens."""
    if at is not None:
        return h[torch.arange(len(at)), at].float()
    mask = rows.mask.to(h.device)[..., None]
    return h.float().masked_fill(mask == 0, 0).sum(1) / mask.sum(1)


# A linear probe


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Multinomial logistic regression on standardised features; made by `fit`."""

    classes: tuple[Any, ...]
    weight: Tensor  # [classes, d], float64, for standardised features
    bias: Tensor  # [classes]
    centre: Tensor  # [d], mean of the training features
    scale: Tensor  # [d], their standard deviation
    majority: Any  # the most frequent training label

    @classmethod
    def fit(cls, features: Tensor, labels: Sequence[Any], *, l2: float = 0.01) -> "LinearProbe":
        """Minimise mean cross-entropy + l2/2 · ‖W‖² by LBFGS in float64, from zero.

        `features`: [rows, d]. `labels`: [rows]. The problem is convex and the start fixed, so the same data give the
        same probe. Raises EditkitError for a single class, missing labels, features that are not finite, or unequal
        lengths.
        """
        x, labels = _matrix(features, labels)
        counts = Counter(labels)
        if None in counts or len(counts) < 2:
            problem = f"{counts[None]} of {len(labels)} labels are None" if None in counts else f"all are {labels[0]!r}"
            raise EditkitError(f"A probe tells classes apart; {problem}. Give two classes or more, and every row one.")
        if not l2 > 0:
            raise EditkitError(f"l2={l2}: it must be above 0, or separable classes have no best weights.")
        classes = sorted(counts, key=lambda label: (str(label), repr(label)))
        index = {label: i for i, label in enumerate(classes)}
        target = torch.tensor([index[label] for label in labels])
        centre, scale = x.mean(0), x.std(0, correction=0)
        scale = torch.where(scale > 0, scale, 1.0)  # a constant feature must not divide by 0
        x = (x - centre) / scale
        weight = torch.zeros(len(classes), x.shape[1], dtype=x.dtype, requires_grad=True)
        bias = torch.zeros(len(classes), dtype=x.dtype, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [weight, bias], max_iter=500, tolerance_grad=1e-7, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(x @ weight.T + bias, target) + l2 / 2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimiser.step(closure)
        return cls(tuple(classes), weight.detach(), bias.detach(), centre, scale, counts.most_common(1)[0][0])

    def predict(self, features: Tensor) -> list[Any]:
        """[rows]: the likeliest class of each row of `features` [rows, d]."""
        x = features.detach().double().cpu()
        if x.ndim != 2 or x.shape[1] != len(self.centre):
            raise EditkitError(f"Features of {list(x.shape)} were given to a probe for [rows, {len(self.centre)}].")
        scores = (x - self.centre) / self.scale @ self.weight.T + self.bias
        return [self.classes[i] for i in scores.argmax(1).tolist()]

    def accuracy(self, features: Tensor, labels: Sequence[Any]) -> float:
        """The share of rows [rows, d] whose label is predicted, 0 to 1."""
        _, labels = _matrix(features, labels)
        right = [bool(p == label) for p, label in zip(self.predict(features), labels, strict=True)]
        return sum(right) / len(right)


def _matrix(features: Tensor, labels: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    labels = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    x = features.detach().double().cpu()
    if x.ndim != 2 or not len(labels) or len(x) != len(labels):
        raise EditkitError(f"Features of {list(x.shape)} with {len(labels)} labels: give [rows, d] and a label a row.")
    if not x.isfinite().all():
        bad = (~x.isfinite()).any(1).sum()
        raise EditkitError(f"{bad} of {len(x)} rows of features hold NaN or infinity: capture them in float32.")
    return x, labels


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """A fitted probe and its accuracy, 0 to 1."""

    probe: LinearProbe
    train_accuracy: float
    test_accuracy: float
    majority_accuracy: float  # on the test rows, of always predicting the most frequent training label
    train_rows: int
    test_rows: int


def fit_probe(
    dataset: "Dataset",
    feature_column: str,
    label_column: str,
    *,
    test: float = 0.25,
    seed: int = 0,
    group_column: str | None = None,
    l2: float = 0.01,
) -> ProbeResult:
    """Fit a `LinearProbe` on some rows of `dataset` and test it on the others.

    - `dataset`: from `features`; the columns used are read into memory.
    - `feature_column`, `label_column`: names of the columns.
    - `test`: the share of rows to test on, drawn with `seed`.
    - `group_column`: if given, groups are divided instead of rows. Rows about one subject must not be on both sides,
      since the probe could then recognise the subject.
    - `l2`: see `LinearProbe.fit`.

    Raises EditkitError for a column that does not exist, an empty side, and what `LinearProbe.fit` refuses.
    """
    for column in [feature_column, label_column, *([group_column] if group_column else [])]:
        if column not in dataset.column_names:
            raise EditkitError(f"No column '{column}': {did_you_mean(column, dataset.column_names)}")
    # 1) read the columns
    x = dataset.with_format("torch")[feature_column][:]
    plain = dataset.with_format(None)
    labels = plain[label_column][:]
    if not isinstance(x, Tensor):
        raise EditkitError(f"'{feature_column}' is not one vector a row. Give a column that features() made.")
    groups = plain[group_column][:] if group_column else list(range(len(labels)))
    # 2) divide the groups
    names = list(dict.fromkeys(groups))
    held = round(test * len(names))
    if not 0 < held < len(names):
        what = f"'{group_column}' groups" if group_column else "rows"
        raise EditkitError(
            f"test={test} of {len(names)} {what} leaves one side empty. Give more rows or another share."
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    tested = {names[i] for i in order[:held]}
    out = torch.tensor([g in tested for g in groups])
    seen, unseen = [[label for label, o in zip(labels, out, strict=True) if o == side] for side in (False, True)]
    # 3) fit on one side, test on the other
    probe = LinearProbe.fit(x[~out], seen, l2=l2)
    return ProbeResult(
        probe,
        probe.accuracy(x[~out], seen),
        probe.accuracy(x[out], unseen),
        unseen.count(probe.majority) / len(unseen),
        len(seen),
        len(unseen),
    )
