"""How a trace is run: the full model for each place, or only the blocks and tokens that the place can reach.

A place is a token and a block whose clean activation is put back. `FullDepth` runs all tokens and blocks for each
place, as the paper's code does. `Replayed` gives the same values and runs only later blocks and later tokens; the
places of all blocks at one token run in one batch, each joining it at its own block, so that matrix products are large.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from editkit.models.experts import site_of
from editkit.models.head import logits_of
from editkit.models.load import LanguageModel
from editkit.models.passes import CannotReplay
from editkit.models.replay import replay
from editkit.models.tokens import tokenise, unflatten
from editkit.nethook import Trace, get_module

HEAD_ROWS = 128  # rows whose logits are in memory at once

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """What is changed at one token: clean outputs of `kind` put back in `blocks`, those of `held` kept corrupted."""

    kind: str  # state, mlp, attention
    blocks: range
    held: str = ""  # mlp, attention: in all later blocks

    @property
    def start(self) -> int:
        """The first block that computes something other than in the corrupted run."""
        return self.blocks.stop if self.kind == "state" else self.blocks.start


def places_of(kind: str, layers: int, window: int) -> list[Place]:
    """The place of `kind` at each block; MLP and attention outputs in a window around it, as in the paper's code."""
    if kind in ("mlp", "attention"):
        return [Place(kind, range(max(0, i - window // 2), min(layers, i + (window + 1) // 2))) for i in range(layers)]
    held = kind.removeprefix("severed_") if kind != "state" else ""
    return [Place("state", range(i, i + 1), held) for i in range(layers)]


class FullDepth:
    """Runs the full model once for each place, as the paper's code does.

    - `text`: the prompt. `first`: position of the subject's first token.
    - `subject`: [samples, tokens, d_embedding], the corrupted embeddings of the subject's tokens.
    """

    def __init__(self, lm: LanguageModel, text: str, first: int, subject: Tensor) -> None:
        self.lm, self.first, self.subject, self.samples = lm, first, subject, len(subject)
        self.rows = tokenise(lm, [text] * self.samples)
        self.sites = [self.site(kind, block) for kind in ("state", "mlp", "attention") for block in range(lm.layers)]
        with Trace(lm.model, self.sites, clone=True) as trace:  # Falcon adds to an output in place
            logits = lm.model(**tokenise(lm, [text]).inputs(), use_cache=False).logits[0, -1].float()
        self.clean_outputs = {site: unflatten(trace[site].output, 1)[0] for site in self.sites}  # [tokens, d_model]
        self.answer = int(logits.argmax())
        self.clean = logits.softmax(-1)[self.answer].item()
        self.corrupted = self._corrupted()

    def site(self, kind: str, block: int) -> str:
        """The module whose output is put back; for an MLP the down-projection, since Bloom's MLP adds the residual, and
        for a mixture of experts all of it."""
        if kind == "mlp":
            return site_of(self.lm, block)
        where = self.lm.architecture
        return (where.block if kind == "state" else where.attention_output).format(block)

    def at(self, token: int, places: Sequence[Place]) -> list[float]:
        """P(answer) with each of the places put back at `token`; one value for each place."""
        return [self._of(self._logits(self._changes(token, place))) for place in places]

    def _corrupted(self) -> float:
        """P(answer) in the corrupted run; keeps its outputs [samples, tokens, d_model]."""
        with Trace(self.lm.model, self.sites, clone=True) as trace:
            logits = self._logits({})
        self._noisy = {site: unflatten(trace[site].output, self.samples) for site in self.sites}
        return self._of(logits)

    def _changes(self, token: int, place: Place) -> dict[str, Change]:
        """{site: change of its output} for one place."""

        def putting(value: Tensor) -> Change:
            def put(h: Tensor) -> Tensor:
                h = h.clone()
                unflatten(h, self.samples)[:, token] = value
                return h

            return put

        sites = [self.site(place.kind, block) for block in place.blocks]
        changes = {site: putting(self.clean_outputs[site][token]) for site in sites}
        if place.held:
            sites = [self.site(place.held, block) for block in range(place.start, self.lm.layers)]
            changes |= {site: putting(self._noisy[site][:, token]) for site in sites}
        return changes

    def _logits(self, changes: dict[str, Change]) -> Tensor:
        """[samples, vocabulary]: the logits of the corrupted prompt's last token, with these changes."""
        changes = {self.lm.architecture.embedding: lambda h: corrupted(h, self.subject, self.first)} | changes
        with Trace(self.lm.model, list(changes), outputs=False, edit=changes):
            logits: Tensor = self.lm.model(**self.rows.inputs(), use_cache=False).logits
        return logits[:, -1]

    def _of(self, logits: Tensor) -> float:
        """P(answer), mean over samples, from logits [samples, vocabulary]."""
        return logits.float().softmax(-1)[:, self.answer].double().mean().item()


class Replayed(FullDepth):
    """Runs only what a place can reach, on the keys, values and streams of one corrupted run. Raises CannotReplay."""

    def _corrupted(self) -> float:
        lm, samples = self.lm, self.samples
        # 1) rows to replay: in front a clean one, for replay's own check; at the end a shorter one, since without
        # padding transformers leaves out the mask that later columns need
        rows = tokenise(lm, [self.rows.texts[0]] * (samples + 2))
        end = rows.last(0)
        short = end - (end > self.first)

        def corrupt(h: Tensor) -> Tensor:
            if len(h) != samples + 2:  # the pass over earlier tokens, and the check
                return h
            return torch.cat((h[:1], corrupted(h[1:-1], self.subject, 0), h[-1:]))

        # 2) the corrupted samples alone, from the subject's first token on, with what each block reads
        given = [self.first] * (samples + 2), [end] * (samples + 1) + [short]
        with Trace(lm.model, lm.architecture.embedding, outputs=False, edit=corrupt):
            ready = replay(lm, rows, *given, start=0, everything=True)
        self._ready = ready.of(torch.arange(1, samples + 1, device=lm.device))
        return self._of(logits_of(lm, self._ready.final[:, -1]))

    @cached_property
    def _outputs(self) -> dict[str, Tensor]:
        """{site: what the corrupted run's MLPs and attentions give, [samples, columns, d_model]}."""
        held = [self.site(kind, block) for kind in ("mlp", "attention") for block in range(self.lm.layers)]
        with Trace(self.lm.model, held, clone=True) as outputs:
            self._ready.run(self._ready.stream)
        return {site: unflatten(outputs[site].output, self.samples) for site in held}

    def at(self, token: int, places: Sequence[Place]) -> list[float]:
        last = token == self.rows.last(0)
        # The last block's output at a token affects no other token.
        live = [i for i, place in enumerate(places) if last or place.start < self.lm.layers - (place.kind != "state")]
        live.sort(key=lambda i: places[i].start)
        probabilities = [self.corrupted] * len(places)
        for i, probability in zip(live, self._together(token, [places[i] for i in live]), strict=True):
            probabilities[i] = probability
        return probabilities

    def _together(self, token: int, places: Sequence[Place]) -> list[float]:
        """P(answer) with each of the places put back at `token`, in one batch.

        `places` are in the order of their first blocks. Each has `samples` rows, which join the batch at that block.
        """
        lm, samples, column = self.lm, self.samples, token - self.first
        streams, end = self._ready.streams, self.rows.last(0)
        h = streams[0][:0, column:]  # [places begun · samples, columns, d_model], at first no row
        begun = 0
        for block in range(lm.layers + 1):
            # 1) places that begin here join with the corrupted run's stream; a state is put back in it
            for place in places[begun:]:
                if place.start > block:
                    break
                stream = streams[block][:, column:]
                if place.kind == "state":
                    stream = stream.clone()
                    stream[:, 0] = self.clean_outputs[self.site("state", block - 1)][token]
                h, begun = torch.cat((h, stream)), begun + 1
            if not begun or block == lm.layers:
                continue
            one = self._ready.after(column, block, self._ready.seen).first_block().times(begun)
            # 2) one block, with its MLP and attention outputs put back or held
            if block < lm.layers - 1 or token == end:
                changes = self._changes_in(block, token, places[:begun])
                with Trace(lm.model, list(changes), outputs=False, edit=changes) if changes else nullcontext():
                    h = one.through(h)
            # 3) of the last block only keys and values of tokens before the last: no change there reaches the answer
            else:
                seen = one.keys_alone(h)
                alone = self._ready.after(end - self.first, block, seen).first_block()
                h = replace(alone.times(begun), kept=alone.kept).through(h[:, -1:])
        # 4) the answer at the last token
        h = get_module(lm.model, lm.architecture.final_norm)(h[:, -1])
        p = [logits_of(lm, some).float().softmax(-1)[:, self.answer] for some in h.split(HEAD_ROWS)]
        return torch.cat(p).double().view(len(places), samples).mean(1).tolist() if places else []

    def _changes_in(self, block: int, token: int, places: Sequence[Place]) -> dict[str, Change]:
        """{site: change of its output at column 0} in one block, for the rows of the places that change it."""
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        for number, place in enumerate(places):
            if place.kind != "state" and block in place.blocks:
                site = self.site(place.kind, block)
                parts.setdefault(site, []).append((number, self.clean_outputs[site][token]))
            if place.held:
                site = self.site(place.held, block)
                parts.setdefault(site, []).append((number, self._outputs[site][:, token - self.first]))

        def putting(values: list[tuple[int, Tensor]]) -> Change:
            def put(h: Tensor) -> Tensor:
                h = h.clone()
                each = unflatten(h, len(places) * self.samples)
                for number, value in values:
                    each[number * self.samples : (number + 1) * self.samples, 0] = value
                return h

            return put

        return {site: putting(values) for site, values in parts.items()}


def corrupted(h: Tensor, subject: Tensor, begin: int) -> Tensor:
    """`h` [samples, tokens, d_embedding] with the embeddings from token `begin` on replaced by `subject`."""
    h = h.clone()
    h[:, begin : begin + subject.shape[1]] = subject
    return h


def started(lm: LanguageModel, text: str, first: int, subject: Tensor, engine: str) -> FullDepth:
    """Start the engine: a clean and a corrupted run of the prompt.

    - `lm`, `text`, `first`, `subject`: see FullDepth.
    - `engine`: "full", or "replay", which falls back to "full" with a warning where the model cannot be replayed.
    """
    if engine == "full":
        return FullDepth(lm, text, first, subject)
    try:
        return Replayed(lm, text, first, subject)
    except CannotReplay as error:
        warnings.warn(
            f"The family '{lm.architecture.family}' is traced at full depth, which is slow: {error}", stacklevel=3
        )
        return FullDepth(lm, text, first, subject)
