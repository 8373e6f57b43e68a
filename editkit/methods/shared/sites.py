"""What passes through the edited modules at the lookup token: the keys and values that an update is computed from.

`at_lookup` reads one module in a pass of its own. `Lookups` reads what a method over several blocks needs: one pass,
which keeps the stream that enters the first block to be written, and from there on runs again only the blocks that a
written one changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editkit.facts import Fact
from editkit.methods.shared.engine import AtLookup
from editkit.models.experts import site_of
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.passes import tolerance
from editkit.models.precision import wide, widened
from editkit.models.products import quick_products
from editkit.models.tokens import tokenise, unflatten
from editkit.nethook import Trace, get_module, hidden, with_input

ROWS = 64  # of a pass; of like length, so that little is padding
KEPT_BYTES = 2**30  # that the streams kept by one Lookups may take

Asked = tuple[Fact, str]  # a fact, and its prompt inside a context
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a block


@torch.no_grad()
@quick_products()
def at_lookup(lm: LanguageModel, site: str, facts: Sequence[Fact], templates: Sequence[str], token: str) -> AtLookup:
    """Input and output of `site` at the lookup token of each fact in each template, [facts, templates, d] each.

    - `site`: a module's name.
    - `templates`: contexts with one `{}` for the prompt.
    - `token`: which token is looked up (lookup.py).

    The pass ends at the site and at the lookup token, since nothing later can change what is read there. A half model
    on the CPU runs in float32.
    """
    asked = _asked(facts, templates)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with widened(lm):
        for part in _parts(asked, range(len(asked))):
            inputs, at = _inputs(lm, [asked[i] for i in part], token)
            with Trace(lm.model, site, inputs=True, outputs=True, stop=True) as trace:
                lm.model(**inputs, use_cache=False)
            both = [_read(each, at) for each in (trace.input, trace.output)]
            found |= {i: (both[0][row], both[1][row]) for row, i in enumerate(part)}
    shape = (len(facts), len(templates), -1)
    return AtLookup(*(torch.stack([found[i][side] for i in range(len(asked))]).view(shape) for side in (0, 1)))


@dataclass
class _Part:
    """Some rows, with the stream that enters the next block to be written."""

    which: list[int]  # of all rows
    at: Tensor  # the lookup token of each row
    calls: list[Call]  # of the blocks from the first written one to the last
    stream: Tensor  # [rows, tokens, d_model]


class Lookups:
    """Keys and targets at the lookup token, while one block after the other is written.

        lookups = Lookups(lm, facts, templates, token, layers, target_site)
        for layer in layers:
            lookups.keys(layer), lookups.values()      # as the model is now
            ...                                        # write block `layer`

    Nothing below the first of `layers` may change meanwhile, nor a block once it has been passed. Where a model's
    blocks cannot be run alone, or the streams would take too much memory, every reading is a pass of its own.
    """

    def __init__(
        self,
        lm: LanguageModel,
        facts: Sequence[Fact],
        templates: Sequence[str],
        token: str,
        layers: Sequence[int],
        target_site: str,
        sites: Sequence[str] = (),
        *,
        keep: bool = True,
    ) -> None:
        """Read what the model gives before anything is written.

        - `facts`, `token`: as for at_lookup. `templates`: the bare "{}" first.
        - `layers`: blocks to be written, ascending.
        - `target_site`: the module that `values` reads: the last block, or a module in it.
        - `sites`: more modules of the last block, whose outputs are read once, for `start`.
        - `keep`: False makes every reading a pass of its own.
        """
        self._lm, self._facts, self._templates, self._token = lm, list(facts), list(templates), token
        self._layers, self._target_site = list(layers), target_site
        self._at = layers[0]  # the block that the kept streams enter
        self._parts: list[_Part] = []
        self._first: dict[int, Tensor] = {}  # keys of the first block, of each row; rows of the bare prompts first
        self._start: dict[str, dict[int, Tensor]] = {site: {} for site in (*sites, target_site)}
        if not (keep and self._pass()):
            for site, found in self._start.items():
                found |= dict(enumerate(at_lookup(lm, site, facts, templates[:1], token).output[:, 0]))

    def start(self, site: str) -> Tensor:
        """What `site`, of those given, put out for the bare prompts before anything was written, [facts, d]."""
        return torch.stack([self._start[site][i] for i in range(len(self._facts))])

    @torch.no_grad()
    @quick_products()
    def keys(self, layer: int) -> Tensor:
        """Input of block `layer`'s down-projection now, [facts, templates, d_ff] in float64 on the CPU; of a mixture of
        experts that of its MLP, [facts, templates, d_model]."""
        begin, self._at = self._at, layer
        site = site_of(self._lm, layer)
        if layer == self._layers[0] and self._first:
            found = self._first
        elif self._parts:
            found = {}
            with widened(self._lm):
                for part in self._parts:
                    for block in range(begin, layer):
                        part.stream = self._run(part, block, part.stream)
                    with Trace(self._lm.model, site, inputs=True, outputs=False, stop=True) as trace:
                        self._run(part, layer, part.stream)
                    found |= dict(zip(part.which, _read(trace.input, part.at), strict=True))
        else:
            return at_lookup(self._lm, site, self._facts, self._templates, self._token).input
        rows = torch.stack([found[i] for i in range(len(found))])
        return rows.view(len(self._templates), len(self._facts), -1).transpose(0, 1)

    @torch.no_grad()
    @quick_products()
    def values(self) -> Tensor:
        """Output of the target site for the bare prompts now, [facts, d_model] in float64 on the CPU."""
        if self._at == self._layers[0]:  # nothing has been written
            return self.start(self._target_site)
        if not self._parts:
            return at_lookup(self._lm, self._target_site, self._facts, self._templates[:1], self._token).output[:, 0]
        with widened(self._lm):
            bare = [part for part in self._parts if part.which[0] < len(self._facts)]
            found = {i: row for part in bare for i, row in zip(part.which, self._target(part), strict=True)}
        return torch.stack([found[i] for i in range(len(self._facts))])

    @torch.no_grad()
    @quick_products()
    def _pass(self) -> bool:
        """One pass over all rows; False where it would keep too much."""
        lm, facts, several = self._lm, len(self._facts), len(self._layers) > 1
        asked = [row for template in self._templates for row in _asked(self._facts, [template])]
        ranges = range(facts), range(facts, len(asked))  # the bare prompts go further, so they are apart
        parts = [
            (part, *_inputs(lm, [asked[i] for i in part], self._token)) for r in ranges for part in _parts(asked, r)
        ]
        width = lm.model.config.get_text_config().hidden_size * wide(lm.dtype).itemsize
        if several and sum(inputs["input_ids"].numel() for _, inputs, _ in parts) * width > KEPT_BYTES:
            return False
        down = site_of(lm, self._layers[0])
        written = range(self._layers[0], self._layers[-1] + 1) if several else ()
        blocks = [lm.architecture.block.format(block) for block in written]
        with widened(lm):
            for which, inputs, at in parts:
                starts = self._start if which[0] < facts else ()
                names = list(dict.fromkeys((down, *blocks, *starts)))
                # Copies, since Falcon adds to an output in place.
                with Trace(lm.model, names, inputs=True, outputs=True, clone=True, stop=True) as trace:
                    lm.model(**inputs, use_cache=False)
                self._first |= dict(zip(which, _read(trace[down].input, at), strict=True))
                for site in starts:
                    self._start[site] |= dict(zip(which, _read(trace[site].output, at), strict=True))
                if blocks:
                    stream = trace[blocks[0]].input
                    nothing = stream.new_empty(0)
                    calls = [with_input(*trace[block].inputs, lambda _, nothing=nothing: nothing) for block in blocks]
                    self._parts.append(_Part(which, at, calls, stream))
            if self._parts and not self._runs_alone():
                self._parts = []
        return True

    def _runs_alone(self) -> bool:
        """Whether the blocks, run from the kept stream, give what the pass gave: measured on the first rows."""
        part = self._parts[0]
        wanted = torch.stack([self._start[self._target_site][i] for i in part.which])
        apart = ((self._target(part) - wanted).abs().max() / wanted.abs().max()).item()
        return bool(apart <= tolerance(self._lm))

    def _run(self, part: _Part, block: int, stream: Tensor) -> Tensor:
        """[rows, tokens, d_model] that leaves block `block`."""
        args, kwargs = with_input(*part.calls[block - self._layers[0]], lambda _: stream)
        return hidden(get_module(self._lm.model, self._lm.architecture.block.format(block))(*args, **kwargs))

    def _target(self, part: _Part) -> Tensor:
        """Output of the target site, [rows, d_model], from the kept stream on."""
        stream = part.stream
        with Trace(self._lm.model, self._target_site, stop=True) as trace:
            for block in range(self._at, self._layers[-1] + 1):
                stream = self._run(part, block, stream)
        return _read(trace.output, part.at)


def _asked(facts: Sequence[Fact], templates: Sequence[str]) -> list[Asked]:
    """Every fact in every template, one fact after the other."""
    return [(fact, context.replace("{}", fact.prompt)) for fact in facts for context in templates]


def _parts(asked: Sequence[Asked], which: Sequence[int]) -> list[list[int]]:
    """`which` of the rows, in passes of like length."""
    order = sorted(which, key=lambda i: len(asked[i][1]) + len(asked[i][0].subject))
    return [order[begin : begin + ROWS] for begin in range(0, len(order), ROWS)]


def _inputs(lm: LanguageModel, asked: Sequence[Asked], token: str) -> tuple[dict[str, Tensor], Tensor]:
    """What the model takes for these rows, up to the last lookup token, and the lookup token of each [rows]."""
    rows = tokenise(lm, [fact.filled(context) for fact, context in asked])
    at = [lookup_position(rows, row, context, fact.subject, token) for row, (fact, context) in enumerate(asked)]
    return {name: value[:, : max(at) + 1] for name, value in rows.inputs().items()}, torch.tensor(at)


def _read(tensor: Tensor, at: Tensor) -> Tensor:
    """A module's input or output at the lookup token of each row, [rows, d] in float64 on the CPU."""
    return unflatten(tensor, len(at))[torch.arange(len(at)), at].double().cpu()
