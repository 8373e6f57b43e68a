"""Prompts with their whole answers, cut into windows: where a value may be written, and what passes there.

    prompt  a1 a2 a3  a4 a5 a6  a7        windows of three tokens
         ^        ^         ^             the places: each predicts the first token of its window

`Lookups` (sites.py) reads one token of a prompt. Here every row holds the answer too, a fact has one place for each
window, and all other tokens of the text are read as well, as keys that shall keep their values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from editkit.errors import FactError
from editkit.facts import Fact
from editkit.methods.shared.engine import FactRows, Fixed
from editkit.models.experts import down_of, keys_of, site_of
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.precision import wide, widened
from editkit.models.products import quick_products
from editkit.models.tokens import Rows, Scored, encode_with_targets, spaced, unflatten
from editkit.nethook import Trace

ROWS = 16  # of a pass; of like length, so that little is padding


class Passages:
    """The texts of `facts` in `templates`, and what passes at their places while one block after the other is written.

        passages = Passages(lm, facts, templates, window, token, layers, target_site)
        for layer in layers:
            passages.keys(layer), passages.values(), passages.others(layer)      # as the model is now
            ...                                                                  # write block `layer`

    A value is named by its place in `values_of`: the windows of the first fact, then those of the second, …
    """

    def __init__(
        self,
        lm: LanguageModel,
        facts: Sequence[Fact],
        templates: Sequence[str],
        window: int,
        token: str,
        layers: Sequence[int],
        target_site: str,
    ) -> None:
        """Find the places, and read what the model gives before anything is written.

        - `templates`: contexts with one `{}` for the prompt, the bare "{}" first.
        - `window`: tokens of the answer in each, at most.
        - `token`: where the first window's place is: "last", or one of lookup.py's at the subject.
        - `layers`: blocks to be written, ascending.
        - `target_site`: the module that `values` reads: the last block, or a module in it.

        Raises FactError for a token that cannot be found, and for an answer whose tokens are others in a context.
        """
        self._lm, self._templates, self._target_site = lm, len(templates), target_site
        self._scored: list[Scored] = []  # of each fact, a row for each template
        self._windows: list[list[list[list[int]]]] = []  # [fact][window][template]: positions of its tokens
        self._places: list[list[list[int]]] = []  # [fact][window][template]
        for fact in facts:
            prompts = [template.replace("{}", fact.prompt) for template in templates]
            filled = [fact.filled(prompt) for prompt in prompts]
            scored = encode_with_targets(lm, filled, [spaced(fact.target_new)] * len(prompts))
            windows = [
                [answer[begin : begin + window] for answer in scored.positions]
                for begin in range(0, len(scored.positions[0]), window)
            ]
            if len({len(answer) for answer in scored.positions}) > 1:
                raise FactError(
                    f"The tokenizer of '{lm.name}' gives {fact.target_new!r} other tokens in a context than after the "
                    "bare prompt. Leave contexts out, as by method.contexts.counts=[] and method.contexts.lengths=[]."
                )
            places = [[answer[0] - 1 for answer in each] for each in windows]
            if token != "last":
                subject = fact.subject
                places[0] = [
                    lookup_position(scored.rows, i, prompt, subject, token) for i, prompt in enumerate(prompts)
                ]
                if any(at >= answer[0] for at, answer in zip(places[0], scored.positions, strict=True)):
                    raise FactError(
                        f"The token '{token}' of {fact.text!r} lies in the answer, and what is written there comes too "
                        "late for its first token. Use method.fact_token=last or subject_last."
                    )
            self._scored.append(scored)
            self._windows.append(windows)
            self._places.append(places)
        self.windows = [len(each) for each in self._windows]  # of each fact
        self._now: int | None = layers[0]  # the block whose input `_read` has
        self._site = site_of(lm, layers[-1])
        self._pass(layers[0], [self._site])
        self.start, self.outputs = self._values, self._outputs  # [n, d_model]: target site and last site, unedited

    @property
    def values_of(self) -> list[tuple[int, int]]:
        """(fact, window) of each of the n values."""
        return [(fact, window) for fact, count in enumerate(self.windows) for window in range(count)]

    def rows(self, fact: int, window: int, earlier: Sequence[Tensor]) -> FactRows:
        """The rows from which δ of a window is computed: the window's tokens are scored, after all before them.

        `earlier`: δ [d_model] of the windows before, which are added at their places.
        """
        scored, places, dtype = self._scored[fact], self._places[fact], wide(self._lm.dtype)
        fixed = [
            Fixed(row, at, delta.to(dtype))
            for delta, each in zip(earlier, places, strict=False)
            for row, at in enumerate(each)
        ]
        asked = Scored(scored.rows, self._windows[fact][window])
        return FactRows(asked, places[window], self._templates, tuple(fixed))

    def keys(self, layer: int) -> Tensor:
        """Input of block `layer`'s site at the places now, [n, templates, d] in float64 on the CPU."""
        self._at(layer)
        inputs = [self._inputs[fact] for fact in range(len(self.windows))]
        return torch.stack(
            [
                torch.stack([inputs[fact][row][at] for row, at in enumerate(self._places[fact][window])])
                for fact, window in self.values_of
            ]
        )

    def values(self) -> Tensor:
        """The target site's output at the places of the bare prompts, [n, d_model] in float64 on the CPU, when `keys`
        was last asked."""
        return self._values

    def others(self, layer: int) -> Tensor:
        """Keys [d_ff, m] of block `layer` now at all other tokens of the bare prompts and their answers, in float64.

        The last token of an answer is one of them. A place that two facts share counts for each.
        """
        self._at(layer)
        found = []
        for fact, places in enumerate(self._places):
            taken = {each[0] for each in places}
            count = len(self._scored[fact].rows.offsets[0])
            rest = [at for at in range(count) if at not in taken]
            with widened(self._lm):
                found.append(keys_of(self._lm, down_of(self._lm, layer), self._inputs[fact][0][rest]))
        return torch.cat(found).double().cpu().T

    def _at(self, layer: int) -> None:
        """Have the inputs of block `layer`, as the model was when its keys were first asked for."""
        if self._now != layer:
            self._pass(layer)
            self._now = layer

    @torch.no_grad()
    @quick_products()
    def _pass(self, layer: int, more: Sequence[str] = ()) -> None:
        """Read all rows: the input of block `layer`'s site, and outputs of the target site and of the sites `more`."""
        lm, site = self._lm, site_of(self._lm, layer)
        names = list(dict.fromkeys((site, *more, self._target_site)))
        asked = [(fact, row) for fact in range(len(self.windows)) for row in range(self._templates)]
        asked.sort(key=lambda one: len(self._scored[one[0]].rows.offsets[one[1]]))
        inputs: dict[tuple[int, int], Tensor] = {}
        outputs: dict[str, dict[int, Tensor]] = {name: {} for name in (*more, self._target_site)}
        with widened(lm):
            for begin in range(0, len(asked), ROWS):
                part = asked[begin : begin + ROWS]
                rows = Rows.joined([_one(self._scored[fact].rows, row) for fact, row in part])
                # Copies, since Falcon adds to an output in place.
                with Trace(lm.model, names, inputs=True, outputs=True, clone=True, stop=True) as trace:
                    lm.model(**rows.inputs(), use_cache=False)
                given = unflatten(trace[site].input, len(part)).double().cpu()
                gave = {name: unflatten(trace[name].output, len(part)).double().cpu() for name in outputs}
                for number, (fact, row) in enumerate(part):
                    inputs[fact, row] = given[number]
                    if row == 0:
                        for name, found in outputs.items():
                            found[fact] = gave[name][number]
        self._inputs = [[inputs[fact, row] for row in range(self._templates)] for fact in range(len(self.windows))]
        read = {
            name: torch.stack([found[fact][self._places[fact][window][0]] for fact, window in self.values_of])
            for name, found in outputs.items()
        }
        self._values, self._outputs = read[self._target_site], read.get(self._site, read[self._target_site])


def _one(rows: Rows, row: int) -> Rows:
    """One of the rows, without its padding."""
    length = len(rows.offsets[row])
    ids, mask = rows.ids[row : row + 1, :length], rows.mask[row : row + 1, :length]
    return Rows((rows.texts[row],), ids, mask, [rows.offsets[row]])
