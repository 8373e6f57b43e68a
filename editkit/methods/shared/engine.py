"""Two engines that run the model with a δ added for each fact, and give logits and the gradient of δ.

`FullDepth` runs what the reference code runs: every row, token, block and logit. `Replayed` gives the same logits, but
runs only the blocks from the edited one on, and only the tokens from the first changed one on (replay.py).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from editkit.facts import Fact
from editkit.models.experts import site_of
from editkit.models.head import logits_of
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.precision import wide
from editkit.models.replay import Replay, replay
from editkit.models.tokens import Rows, Scored, encode_with_targets, spaced, unflatten
from editkit.nethook import Trace

KL_PROMPT = "{} is a"


class Fixed(NamedTuple):
    """A vector that is added to the last site's output besides δ, the same at each step."""

    row: int  # of the fact's
    position: int
    vector: Tensor  # [d_model]


@dataclass(frozen=True)
class FactRows:
    """The rows of one fact's optimisation: contexts × (prompt + target), then the KL row, if it has one."""

    scored: Scored
    lookup: list[int]  # the position of each row's lookup token
    contexts: int  # rows before the KL row
    fixed: tuple[Fixed, ...] = ()

    @cached_property
    def first(self) -> list[int]:
        """The first token of each row whose output is changed: where a replay begins."""
        begins = list(self.lookup)
        for row, position, _ in self.fixed:
            begins[row] = min(begins[row], position)
        return begins

    @cached_property
    def last(self) -> list[int]:
        """The last token of each row whose logits or value are used."""
        asked = [max([at - 1 for at in found], default=0) for found in self.scored.positions]
        return [max(pair) for pair in zip(asked, self.lookup, strict=True)]

    @cached_property
    def columns(self) -> int:
        """The most tokens that a row has from its first changed one on."""
        return max(last - at for last, at in zip(self.last, self.first, strict=True)) + 1


def rows_of(lm: LanguageModel, fact: Fact, token: str, templates: Sequence[str]) -> FactRows:
    """Rows of `fact` in `templates` (the bare "{}" first). Raises FactError when a lookup token cannot be found."""
    prompts = [context.replace("{}", fact.prompt) for context in templates] + [KL_PROMPT]
    targets = [spaced(fact.target_new)] * len(templates) + [""]
    scored = encode_with_targets(lm, [fact.filled(prompt) for prompt in prompts], targets)
    lookup = [lookup_position(scored.rows, row, prompt, fact.subject, token) for row, prompt in enumerate(prompts)]
    return FactRows(scored, lookup, len(templates))


class Batch:
    """The rows of several facts, one fact after the other, and the logits that their losses ask for."""

    def __init__(self, facts: Sequence[FactRows]) -> None:
        self.facts = list(facts)
        self.rows = Rows.joined([each.scored.rows for each in facts])
        device = self.rows.ids.device
        counts = [len(each.lookup) for each in facts]
        self.begins = [sum(counts[:i]) for i in range(len(counts))]  # the first row of each fact
        picks, kl, with_kl, fixed = [], list[tuple[int, int]](), [], list[Fixed]()
        for number, (begin, each) in enumerate(zip(self.begins, facts, strict=True)):
            for row, found in enumerate(each.scored.positions):
                share = 1 / (len(found) * each.contexts) if found else 0.0
                picks += [(begin + row, at - 1, number, share) for at in found]
            if each.contexts < len(each.lookup):
                kl.append((begin + each.contexts, each.lookup[-1]))
                with_kl.append(number)
            fixed += [one._replace(row=begin + one.row) for one in each.fixed]
        read = [(row, at) for row, at, *_ in picks] + kl  # the targets', then one for each KL row
        self.row, self.at = torch.tensor(read, device=device).T  # where logits are read: [targets + KL rows] each
        self.kl_fact = torch.tensor(with_kl, dtype=torch.long, device=device)  # whose KL rows they are [KL rows]
        self.fact = torch.tensor([fact for *_, fact, _ in picks], device=device)  # [targets]
        self.share = torch.tensor([share for *_, share in picks], device=device)  # [targets], weight in the mean NLL
        self.token = self.rows.ids[self.row[: len(picks)], self.at[: len(picks)] + 1]
        self.lookup = torch.tensor([at for each in facts for at in each.lookup], device=device)  # [rows]
        self.first = torch.tensor([at for each in facts for at in each.first], device=device)  # [rows]
        self.fixed_row, self.fixed_at = (
            torch.tensor([one[side] for one in fixed], dtype=torch.long, device=device) for side in (0, 1)
        )  # [fixed] each
        self.fixed = torch.stack([one.vector for one in fixed]).to(device) if fixed else None  # [fixed, d_model]
        self.of_row = torch.arange(len(facts), device=device).repeat_interleave(torch.tensor(counts, device=device))

    def of_facts(self, given: Tensor, gave: Tensor) -> "list[AtLookup]":
        """Split the module's inputs and outputs [rows, d] by fact, dropping KL rows."""
        both = given.double().cpu(), gave.double().cpu()
        spans = [slice(begin, begin + each.contexts) for begin, each in zip(self.begins, self.facts, strict=True)]
        return [AtLookup(*(each[span] for each in both)) for span in spans]

    def some(self, kept: Sequence[int]) -> tuple["Batch", Tensor]:
        """The batch of the facts at places `kept`, and the indices of their rows in this one."""
        rows = [self.begins[i] + row for i in kept for row in range(len(self.facts[i].lookup))]
        return Batch([self.facts[i] for i in kept]), torch.tensor(rows, device=self.lookup.device)


class AtLookup(NamedTuple):
    """A module's input and output at the lookup token, in float64 on the CPU: [facts, templates, d], or
    [templates, d] for one fact."""

    input: Tensor
    output: Tensor


class Engine(Protocol):
    """What the optimisation asks of either engine. δ: [sites, facts, d_model]."""

    batch: Batch

    def clean(self) -> list[AtLookup]:
        """Input and output of the last site without δ, [contexts, d] for each fact."""
        ...

    def logits(self, delta: Tensor) -> Tensor:
        """The logits at the places that `batch.row` and `batch.at` list, [places, vocabulary]."""
        ...

    def gradient(self, loss: Tensor) -> Tensor:
        """The gradient of δ [sites, facts, d_model], from a `loss` of the latest logits; once for each."""
        ...

    def some(self, kept: Sequence[int]) -> "Engine":
        """The engine for the facts at places `kept`."""
        ...


class _Hooked:
    """δ added to the outputs of modules, and its gradient captured there, by the hook layer."""

    def __init__(self, lm: LanguageModel, sites: Sequence[str], batch: Batch, first: Tensor) -> None:
        """`first` [rows]: the position of the first token that runs."""
        self._lm, self._sites, self._batch, self._at = lm, list(sites), batch, batch.lookup - first
        self._rows = torch.arange(len(first), device=first.device)
        self._fixed_at = batch.fixed_at - first[batch.fixed_row]

    @contextlib.contextmanager
    def added(self, delta: Tensor) -> Iterator[None]:
        """In the body the outputs have δ [sites, facts, d_model] added, each row that of its fact."""

        def add(output: Tensor, site: str) -> Tensor:
            changed = output.clone()
            each = delta[self._sites.index(site)].detach()[self._batch.of_row]
            rows, at = (index.to(output.device) for index in (self._rows, self._at))  # of a split model
            unflatten(changed, len(self._at))[rows, at] += each.to(output.device, output.dtype)
            if self._batch.fixed is not None and site == self._sites[-1]:
                rows, at = (index.to(output.device) for index in (self._batch.fixed_row, self._fixed_at))
                unflatten(changed, len(self._at))[rows, at] += self._batch.fixed.to(output.device, output.dtype)
            return changed

        self._like = delta
        self._trace = Trace(self._lm.model, self._sites, outputs=False, grads=True, edit=add, leaf=True)
        with self._trace:
            yield

    def gradient(self, loss: Tensor) -> Tensor:
        torch.autograd.backward(loss)
        grads = [self._trace[site].grad.to(self._at.device) for site in self._sites]
        found = [unflatten(each, len(self._at))[self._rows, self._at] for each in grads]
        grad = torch.zeros_like(self._like)
        return grad.index_add(1, self._batch.of_row, torch.stack(found).to(grad.dtype))


class FullDepth:
    """The whole model on whole rows, as the reference runs it: the oracle of `Replayed`, and what it falls back to."""

    def __init__(self, lm: LanguageModel, layer: int, sites: Sequence[str], batch: Batch) -> None:
        self._lm, self._layer, self._sites, self.batch = lm, layer, sites, batch
        self._hooked = _Hooked(lm, sites, batch, torch.zeros_like(batch.lookup))

    def logits(self, delta: Tensor) -> Tensor:
        with self._hooked.added(delta):
            logits: Tensor = self._lm.model(**self.batch.rows.inputs(), use_cache=False).logits
        return logits[self.batch.row, self.batch.at]

    @torch.no_grad()
    def clean(self) -> list[AtLookup]:
        with Trace(self._lm.model, self._sites[-1], inputs=True, stop=True) as trace:
            self._lm.model(**self.batch.rows.inputs(), use_cache=False)
        at = self.batch.lookup
        rows = torch.arange(len(at), device=at.device)
        both = (each.to(at.device) for each in (trace.input, trace.output))
        return self.batch.of_facts(*(unflatten(each, len(at))[rows, at] for each in both))

    def gradient(self, loss: Tensor) -> Tensor:
        return self._hooked.gradient(loss)

    def some(self, kept: Sequence[int]) -> "FullDepth":
        return FullDepth(self._lm, self._layer, self._sites, self.batch.some(kept)[0])


class Replayed:
    """The same from the edited block and the first changed token on, with logits only where they are read.

    δ of the down-projection alone is added to the residual stream behind the block. Where that is not the same (a
    norm lies between, or attention has a δ too) the block itself is replayed, with δ added by hooks.
    Raises CannotReplay.
    """

    def __init__(
        self, lm: LanguageModel, layer: int, sites: Sequence[str], batch: Batch, ready: Replay | None = None
    ) -> None:
        self._lm, self._layer, self._sites, self.batch = lm, layer, sites, batch
        self._behind = lm.architecture.mlp_norm is None and list(sites) == [site_of(lm, layer)]
        if ready is None:
            first = [at for each in batch.facts for at in each.first]
            last = [at for each in batch.facts for at in each.last]
            ready = replay(lm, batch.rows, first, last, layer + self._behind, sites[-1:])
        self._ready = ready
        self._picks = ready.at(batch.row, batch.at)
        self._hooked = _Hooked(lm, sites, batch, batch.first)
        self._places = torch.arange(len(batch.lookup), device=batch.lookup.device), batch.lookup - batch.first
        self._stream = ready.stream
        if self._behind and batch.fixed is not None:
            places = batch.fixed_row, batch.fixed_at - batch.first[batch.fixed_row]
            there = self._stream[places].to(batch.fixed.dtype) + batch.fixed
            self._stream = self._stream.index_put(places, there.to(self._stream.dtype))

    def logits(self, delta: Tensor) -> Tensor:
        stream = self._stream
        if self._behind:
            self._delta = delta.detach().requires_grad_()
            here = stream[self._places].to(delta.dtype) + self._delta[0][self.batch.of_row]
            final = self._ready.run(stream.index_put(self._places, here.to(stream.dtype)))
        else:
            with self._hooked.added(delta):
                final = self._ready.run(stream)
        return logits_of(self._lm, final[self._picks])

    def clean(self) -> list[AtLookup]:
        return self.batch.of_facts(*self._ready.column0[self._sites[-1]])

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self._delta)[0] if self._behind else self._hooked.gradient(loss)

    def some(self, kept: Sequence[int]) -> "Replayed":
        batch, rows = self.batch.some(kept)
        return Replayed(self._lm, self._layer, self._sites, batch, self._ready.of(rows))


def bytes_of(lm: LanguageModel, facts: Sequence[FactRows], layer: int) -> int:
    """About how much memory a replayed batch of `facts` takes, in bytes: what backward keeps of each block from `layer`
    on, the keys and values of earlier tokens, and the logits."""
    config = lm.model.config.get_text_config()
    itemsize, d = wide(lm.dtype).itemsize, config.hidden_size
    rows = sum(len(each.lookup) for each in facts)
    columns, prefix = max(each.columns for each in facts), max(max(each.first) for each in facts)
    logits = sum(sum(map(len, each.scored.positions)) + 1 for each in facts)
    kept = rows * ((lm.layers - layer) * (48 * columns + 4 * prefix) + 4 * lm.layers * prefix) * d
    return int(kept * lm.dtype.itemsize + logits * config.vocab_size * itemsize * 5)
