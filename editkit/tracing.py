"""Causal tracing: where in a model, and at which token, a fact is recalled (Meng et al. 2022, arXiv 2202.05262, 2).

The subject's embeddings are corrupted by noise, so that the model forgets the answer o it gives to a prompt. Then, one
at a time, the clean activation of one place is put back:

    total effect       TE = P(o | clean) − P(o | corrupted)
    indirect effect    IE = P(o | corrupted, clean h at (token, block)) − P(o | corrupted)

`state` puts back the residual stream behind a block; `mlp` and `attention` the outputs of a window of blocks around it.
All P are means over the samples of noise. A place reaches only later blocks and later tokens, so that is all that is
run for it (replay.py); `engine="full"` runs the whole model for every place, as the reference does.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from editkit.facts import Fact, lookup_position
from editkit.models.load import LanguageModel
from editkit.models.tokens import by_token, tokenise
from editkit.nethook import Trace, get_parameter
from editkit.replay import CannotReplay, KeysAndValues, logits_of, replay
from editkit.settings import TRACE_KINDS as KINDS
from editkit.settings import TraceSettings


@dataclass(frozen=True)
class Traced:
    """The trace of one prompt. `probability[kind]`: [tokens, blocks], P(answer) with that place put back."""

    tokens: list[str]
    subject: tuple[int, int]  # its first and last token
    answer: str  # what the clean model says next
    clean: float  # P(answer)
    corrupted: float
    window: int  # blocks that mlp and attention put back together
    probability: dict[str, Tensor]

    @property
    def total_effect(self) -> float:
        """P(answer) that the corruption takes."""
        return self.clean - self.corrupted

    def indirect_effect(self, kind: str) -> Tensor:
        """[tokens, blocks]: how much of it comes back."""
        return self.probability[kind] - self.corrupted


def trace(
    lm: LanguageModel,
    fact: Fact,
    settings: TraceSettings | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Traced:
    """The causal trace of the fact's prompt. The answer is what the clean model says, whatever the fact's targets are.

    - `settings`: see TraceSettings. `seed`: of the noise. `progress`: a bar on what takes over a second.

    The model is left as it was. Raises FactError when no token covers the subject.
    """
    settings = settings or TraceSettings()
    rows = tokenise(lm, [fact.text])
    first = lookup_position(rows, 0, fact.prompt, fact.subject, "subject_first")
    last = lookup_position(rows, 0, fact.prompt, fact.subject)
    window = settings.window or max(1, round(10 * lm.layers / 48))
    noise = _noise(lm, last + 1 - first, settings, seed)
    with torch.no_grad():
        model = _started(lm, fact.text, first, noise, settings.engine)
        scores = {
            kind: torch.full((rows.last(0) + 1, lm.layers), model.corrupted, dtype=torch.float64)
            for kind in settings.kinds
        }
        total = len(settings.kinds) * lm.layers
        with tqdm(total=total, desc=f"trace of {fact.subject}", disable=not progress, leave=False, delay=1) as bar:
            for kind, table in scores.items():
                for layer in range(lm.layers):
                    for token in range(first, rows.last(0) + 1):
                        table[token, layer] = model.restored(kind, _blocks(lm, kind, layer, window), token)
                    bar.update()
    return Traced(
        tokens=[fact.text[begin:end] for begin, end in rows.offsets[0]],
        subject=(first, last),
        answer=lm.tokenizer.decode([model.answer]),
        clean=model.clean,
        corrupted=model.corrupted,
        window=window,
        probability=scores,
    )


def _noise(lm: LanguageModel, tokens: int, settings: TraceSettings, seed: int) -> Tensor:
    """[samples, tokens, d_embedding] of `settings.noise` standard deviations of the embedding."""
    embedding = get_parameter(lm.model, f"{lm.architecture.embedding}.weight")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(settings.samples, tokens, embedding.shape[1], generator=generator)
    return (settings.noise * embedding.float().std() * drawn.to(embedding.device)).to(embedding.dtype)


def _blocks(lm: LanguageModel, kind: str, layer: int, window: int) -> range:
    """The blocks of which one place is put back: the reference's window around `layer`, cut at the ends."""
    if kind == "state":
        return range(layer, layer + 1)
    return range(max(0, layer - window // 2), min(lm.layers, layer + (window + 1) // 2))


def _site(lm: LanguageModel, kind: str, block: int) -> str:
    """The module whose output is put back; for an MLP its down-projection, which in every family adds nothing else."""
    where = lm.architecture
    return {"state": where.block, "mlp": where.down_projection, "attention": where.attention}[kind].format(block)


class _AtFullDepth:
    """The whole model once for every place, as the reference runs it."""

    def __init__(self, lm: LanguageModel, text: str, first: int, noise: Tensor) -> None:
        self._lm, self._first, self._noise = lm, first, noise
        self._rows = tokenise(lm, [text] * len(noise))
        sites = [_site(lm, kind, block) for kind in KINDS for block in range(lm.layers)]
        with Trace(lm.model, sites, clone=True) as trace:  # Falcon adds to an output in place
            logits = lm.model(**tokenise(lm, [text]).inputs(), use_cache=False).logits[0, -1].float()
        self._clean = {site: by_token(trace[site].output, 1)[0] for site in sites}  # [tokens, d_model] each
        self.answer = int(logits.argmax())
        self.clean = logits.softmax(-1)[self.answer].item()
        self.corrupted = self._corrupted()

    def _corrupted(self) -> float:
        return self._probability({})

    def _probability(self, edits: dict[str, Callable[[Tensor], Tensor]]) -> float:
        def corrupt(h: Tensor) -> Tensor:
            h = h.clone()
            h[:, self._first : self._first + self._noise.shape[1]] += self._noise
            return h

        edits = {self._lm.architecture.embedding: corrupt} | edits
        with Trace(self._lm.model, list(edits), outputs=False, edit=edits):
            logits = self._lm.model(**self._rows.inputs(), use_cache=False).logits[:, -1]
        return self._of(logits)

    def _of(self, logits: Tensor) -> float:
        return logits.float().softmax(-1)[:, self.answer].double().mean().item()

    def _put(self, site: str, token: int, column: int) -> Callable[[Tensor], Tensor]:
        def put(h: Tensor) -> Tensor:
            h = h.clone()
            by_token(h, len(self._noise))[:, column] = self._clean[site][token]
            return h

        return put

    def restored(self, kind: str, blocks: range, token: int) -> float:
        """P(answer) with the clean output of `kind` in `blocks` put back at `token`."""
        sites = [_site(self._lm, kind, block) for block in blocks]
        return self._probability({site: self._put(site, token, token) for site in sites})


class _ByReplay(_AtFullDepth):
    """Only the blocks and tokens that a place can reach, behind what one corrupted run saw. Raises CannotReplay."""

    def _corrupted(self) -> float:
        lm, samples = self._lm, len(self._noise)
        # A clean row in front, for replay's own check; behind, one that ends sooner, without which there is no padding,
        # and transformers leaves out the mask that later columns need.
        rows = tokenise(lm, [self._rows.texts[0]] * (samples + 2))
        end = rows.last(0)
        short = end - (end > self._first)
        noise = torch.nn.functional.pad(self._noise, (0, 0, 0, 0, 1, 1))

        def corrupt(h: Tensor) -> Tensor:
            if len(h) != samples + 2:  # the pass over earlier tokens, and the check
                return h
            h = h.clone()
            h[:, : noise.shape[1]] += noise
            return h

        with Trace(lm.model, lm.architecture.embedding, outputs=False, edit=corrupt):
            ready = replay(lm, rows, [self._first] * (samples + 2), [end] * (samples + 1) + [short], start=0)
        self._ready = ready.of(torch.arange(1, samples + 1, device=lm.device))
        self._seen: KeysAndValues = {}
        sites = [*(_site(lm, "state", block) for block in range(lm.layers)), lm.architecture.final_norm]
        with Trace(lm.model, sites, inputs=True, outputs=False) as trace:
            final = self._ready.run(self._ready.stream, self._seen)
        self._streams = [trace[site].input for site in sites]  # [samples, columns, d_model] entering each block
        return self._of(logits_of(lm, final[:, -1]))

    def restored(self, kind: str, blocks: range, token: int) -> float:
        column, behind = token - self._first, kind == "state"
        start = blocks.start + behind
        stream = self._streams[start][:, column:]
        later = self._ready.after(column, start, self._seen)
        if behind:
            put = self._put(_site(self._lm, kind, blocks.start), token, 0)
            final = later.run(put(stream))
        else:
            edits = {site: self._put(site, token, 0) for site in (_site(self._lm, kind, b) for b in blocks)}
            with Trace(self._lm.model, list(edits), outputs=False, edit=edits):
                final = later.run(stream)
        return self._of(logits_of(self._lm, final[:, -1]))


def _started(lm: LanguageModel, text: str, first: int, noise: Tensor, engine: str) -> _AtFullDepth:
    if engine == "full":
        return _AtFullDepth(lm, text, first, noise)
    try:
        return _ByReplay(lm, text, first, noise)
    except CannotReplay as error:
        warnings.warn(
            f"The family '{lm.architecture.family}' is traced at full depth, which is slow: {error}", stacklevel=3
        )
        return _AtFullDepth(lm, text, first, noise)
