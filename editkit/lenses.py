"""Looking at an edit from inside: answers over depth, attention to the subject, and where an edit is felt.

    logit_lens             what the residual stream behind each block would say, read by the final norm and the head
    attention_to_subject   how much the last token attends to the subject's, by block and head
    side_effects           how much an edit will change what its weight puts out for other prompts, before it is applied
    stream_change          how far one edit moves the residual stream, at each block and token

All of it only looks. An edit that is applied to look is taken back, and that verified, before anything is returned.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from editkit.edit import Delta, Edit
from editkit.errors import EditkitError
from editkit.facts import Fact, lookup_position
from editkit.methods.likelihood import nll_of_rows
from editkit.models.load import LanguageModel
from editkit.models.tokens import Scored, by_token, continued, spaced, tokenise
from editkit.nethook import Trace, get_module, requires_grad
from editkit.replay import logits_of

if TYPE_CHECKING:
    from pandas import DataFrame

T = TypeVar("T")
BATCH = 16  # prompts side by side


def before_and_after(lm: LanguageModel, edit: Edit, look: Callable[[], T]) -> tuple[T, T]:
    """What `look()` gives without and with the edit; the model is as it was, verified, when this returns."""
    before = look()
    with edit.applied(lm):
        after = look()
    return before, after


# Answers over depth


@dataclass(frozen=True, eq=False)
class Lens:
    """What each depth would say at the prompt's last token. Depth 0: the embedding; depth i: behind block i − 1."""

    axes: ClassVar[tuple[str, str]] = ("depth", "word")

    text: str
    words: tuple[str, ...]  # that are watched
    probability: Tensor  # [depths, words], of the first token of each
    rank: Tensor  # [depths, words], 0 for the likeliest token
    said: tuple[str, ...]  # of each depth, the likeliest token

    def to_frame(self) -> "DataFrame":
        """A row a depth and word: depth, word, probability, rank, said."""
        from pandas import DataFrame

        rows = [
            (depth, word, self.probability[depth, w].item(), int(self.rank[depth, w]), self.said[depth])
            for depth in range(len(self.said))
            for w, word in enumerate(self.words)
        ]
        return DataFrame(rows, columns=[*self.axes, "probability", "rank", "said"])


@torch.no_grad()
def logit_lens(lm: LanguageModel, text: str, words: Sequence[str]) -> Lens:
    """The logit lens (nostalgebraist 2020) of one prompt: P(word) behind each block.

    The stream of the last token is put through the final norm and the head; the last depth is the model's own answer.
    `words`: as continuations; of a word of several tokens the first counts. Raises EditkitError for no word, FactError
    for one that has no token of its own.
    """
    if not all(word.strip() for word in words) or not words:
        raise EditkitError(f"The logit lens was given the words {list(words)}: name one or more, none of them empty.")
    scored = continued(lm, [text] * len(words), [spaced(word) for word in words])
    first = torch.tensor([scored.rows.ids[row, at[0]].item() for row, at in enumerate(scored.positions)])
    blocks = [lm.architecture.block.format(i) for i in range(lm.layers)]
    norm = lm.architecture.final_norm
    rows = tokenise(lm, [text])
    with Trace(lm.model, [*blocks, norm], inputs=True, outputs=False) as trace:
        lm.model(**rows.inputs(), use_cache=False)
    stream = torch.stack([by_token(trace[site].input, 1)[0, -1] for site in (*blocks, norm)])  # [depths, d_model]
    logits = logits_of(lm, get_module(lm.model, norm)(stream)).double().cpu()
    of_words = logits[:, first]
    return Lens(
        text=text,
        words=tuple(words),
        probability=logits.softmax(-1)[:, first],
        rank=(logits[:, None] > of_words[..., None]).sum(-1),
        said=tuple(lm.tokenizer.decode([i]) for i in logits.argmax(-1).tolist()),
    )


# Attention to the subject


@dataclass(frozen=True, eq=False)
class Attention:
    """The last token's attention. `weights`: [blocks, heads, tokens], each row over the tokens sums to 1."""

    axes: ClassVar[tuple[str, str, str]] = ("block", "head", "token")

    weights: Tensor
    tokens: tuple[str, ...]
    subject: tuple[int, int]

    @property
    def to_subject(self) -> Tensor:
        """[blocks, heads]: the share that goes to the subject's tokens."""
        first, last = self.subject
        return self.weights[..., first : last + 1].sum(-1)


@torch.no_grad()
def attention_to_subject(lm: LanguageModel, fact: Fact) -> Attention:
    """How the last token of the fact's prompt attends, by block and head.

    Weights exist under transformers' "eager" attention alone: the model is run with it once and set back. Raises
    EditkitError for a model that does not give its weights.
    """
    rows = tokenise(lm, [fact.text])
    first = lookup_position(rows, 0, fact.prompt, fact.subject, "subject_first")
    last = lookup_position(rows, 0, fact.prompt, fact.subject)
    names = [lm.architecture.attention.format(i) for i in range(lm.layers)]
    kept: list[Tensor] = []  # [heads, tokens] of each block, in the order in which they run

    def keep(module: Any, args: Any, output: Any) -> None:
        """By hand: the hook layer keeps what goes on to the next module, and the weights do not."""
        found = [each for each in output if isinstance(each, Tensor) and each.ndim == 4]
        kept.extend(weights[0, :, -1].float().cpu() for weights in found[-1:])

    # Not by output_attentions=True, which leaves transformers' own hooks on the model for good.
    with _eager(lm), ExitStack() as hooks:
        for name in names:
            hooks.callback(get_module(lm.model, name).register_forward_hook(keep).remove)
        lm.model(**rows.inputs(), use_cache=False)
    if len(kept) != lm.layers:
        raise EditkitError(
            f"The family '{lm.architecture.family}' gives attention weights in {len(kept)} of {lm.layers} blocks under "
            "eager attention. Attention cannot be shown for this model."
        )
    tokens = tuple(fact.text[begin:end] for begin, end in rows.offsets[0])
    return Attention(torch.stack(kept), tokens, (first, last))


@contextmanager
def _eager(lm: LanguageModel) -> Iterator[None]:
    """Eager attention inside, the model's own after.

    Set where the modules read it at each call: `set_attn_implementation` does nothing for older families (Falcon).
    """
    configs = {id(module.config): module.config for module in lm.model.modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own


# Side effects, before an edit is applied


@dataclass(frozen=True, eq=False)
class SideEffects:
    """What an edit will do to other prompts, predicted from their keys. Everything is [prompts], float64."""

    prompts: tuple[str, ...]
    change: Tensor  # ‖ΔW k′‖ at the token where it is largest, over the edited weights together
    relative: Tensor  # the same token's ‖ΔW k′‖ / ‖m‖, of what the weights put out unedited
    cosine: Tensor  # cos(k′, u), the largest in size over tokens, with its sign; u: the directions that ΔW reads
    cosine_key: Tensor  # cos(k′, k) with the edited fact's own key likewise; NaN where the edit does not say its fact
    drop: Tensor | None = None  # −Σ g · ΔW k′ over tokens: what log p(target) will lose, to first order


def side_effects(
    lm: LanguageModel, edit: Edit, prompts: Sequence[str], targets: Sequence[str] | None = None
) -> SideEffects:
    """How much `edit` will change what its weights put out for `prompts`, from the keys k′ of the model as it is.

    Exact for the first edited block; for later ones the keys themselves will have moved a little. With `targets`, a
    continuation of each prompt, `drop` is what the target's mean log-probability a token loses, by the gradient g of
    it at the outputs of the edited weights. Raises EditkitError for an edit of another base.
    """
    edit.check_base(lm, whole=False)
    if targets is not None and len(targets) != len(prompts):
        raise EditkitError(f"{len(prompts)} prompts were given with {len(targets)} targets: give one for each.")
    own = _own_keys(lm, edit)
    written = [_Written(delta, _directions(delta), own.get(delta.module)) for delta in edit.deltas]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so that little is padding
    found: dict[int, tuple[float, ...]] = {}
    for begin in range(0, len(order), BATCH):
        part = order[begin : begin + BATCH]
        asked = [spaced(targets[i]) if targets is not None else "" for i in part]
        scored = continued(lm, [prompts[i] for i in part], asked)
        passed = _passed(lm, [each.delta.module for each in written], scored, graded=targets is not None)
        found |= {i: _predicted(written, passed, scored, row) for row, i in enumerate(part)}
    values = torch.tensor([found[i] for i in range(len(prompts))], dtype=torch.float64).view(-1, 5)
    change, relative, cosine, cosine_key, drop = values.T
    return SideEffects(tuple(prompts), change, relative, cosine, cosine_key, None if targets is None else drop)


class _Written(NamedTuple):
    """What an edit writes into one weight."""

    delta: Delta
    directions: Tensor  # [r, d_ff], orthonormal: what ΔW reads
    own: Tensor | None  # [d_ff], the key of the edit's own fact


def _passed(lm: LanguageModel, sites: Sequence[str], scored: Scored, *, graded: bool) -> Trace:
    """What passes through the edited weights; `graded`, with the gradient of each row's mean −log p a token."""
    with torch.set_grad_enabled(graded), requires_grad(lm.model, only=[]):
        # Falcon adds to what its MLP puts out in place, hence the copies.
        with Trace(lm.model, sites, inputs=True, grads=graded, leaf=graded, clone=True) as trace:
            logits = lm.model(**scored.rows.inputs(), use_cache=False).logits
        if graded:
            nll_of_rows(logits, scored).sum().backward()
    return trace


def _predicted(written: Sequence[_Written], passed: Trace, scored: Scored, row: int) -> tuple[float, ...]:
    """The fields of SideEffects of one row; `drop` is 0 where no gradient was taken."""
    rows, asked = len(scored.positions), scored.positions[row]
    tokens = asked[0] if asked else scored.rows.last(row) + 1  # of the prompt
    moved_by, put_out = torch.zeros(2, tokens, dtype=torch.float64)
    cosines, own_cosines, drop = [], [], 0.0

    def of_row(tensor: Tensor) -> Tensor:
        return by_token(tensor, rows)[row].detach().double().cpu()

    for delta, directions, own in written:
        record = passed[delta.module]
        keys = of_row(record.input)  # [tokens with the target's and padding, d_ff]
        moved = _moved(delta, keys)
        moved_by += moved[:tokens].square().sum(-1)
        put_out += of_row(record.output)[:tokens].square().sum(-1)
        cosines.append(_into(keys[:tokens], directions, signed=delta.rank == 1))
        if own is not None:
            own_cosines.append(torch.cosine_similarity(keys[:tokens], own, dim=-1))
        if asked:
            drop += (of_row(record.grad) * moved).sum().item()
    where = int(moved_by.argmax())
    change, relative = moved_by[where].sqrt().item(), (moved_by[where] / put_out[where]).sqrt().item()
    return change, relative, _largest(cosines), _largest(own_cosines), drop


def _moved(delta: Delta, keys: Tensor) -> Tensor:
    """ΔW k for keys [tokens, d_ff]: [tokens, d_model]."""
    if delta.right is None:
        return keys @ delta.left.double().T
    return keys @ delta.right.double().T @ delta.left.double().T


def _directions(delta: Delta) -> Tensor:
    """[r, d_ff]: an orthonormal basis of what ΔW reads; of a rank-one edit u itself, whose sign is the method's."""
    if delta.right is not None and delta.rank == 1:
        return torch.nn.functional.normalize(delta.right.double(), dim=-1)
    _, s, vt = delta.svd()
    return vt[s > 1e-6 * s.max()]


def _into(keys: Tensor, basis: Tensor, *, signed: bool) -> Tensor:
    """[tokens]: the cosine of keys with the space of `basis`; `signed`: with its one direction, sign and all."""
    parts = keys @ basis.T / keys.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return parts[:, 0] if signed else parts.norm(dim=-1)


def _largest(values: Sequence[Tensor]) -> float:
    """The value largest in size, with its sign; NaN of none."""
    if not values:
        return float("nan")
    joined = torch.cat(list(values))
    return joined[joined.abs().argmax()].item()


@torch.no_grad()
def _own_keys(lm: LanguageModel, edit: Edit) -> dict[str, Tensor]:
    """The key [d_ff] of the edit's fact at each of its weights, where its provenance names one fact."""
    facts = edit.provenance.get("facts", [])
    if len(facts) != 1:
        return {}
    fact = Fact(**facts[0])
    token = edit.provenance.get("settings", {}).get("token", "subject_last")
    rows = tokenise(lm, [fact.text])
    at = lookup_position(rows, 0, fact.prompt, fact.subject, token)
    with Trace(lm.model, [delta.module for delta in edit.deltas], inputs=True, outputs=False) as trace:
        lm.model(**rows.inputs(), use_cache=False)
    return {site: by_token(trace[site].input, 1)[0, at].double().cpu() for site in trace}


# Where an edit is felt


@dataclass(frozen=True, eq=False)
class StreamChange:
    """How far an edit moves the residual stream behind each block, at each token. Both [blocks, tokens]."""

    axes: ClassVar[tuple[str, str]] = ("block", "token")

    norm: Tensor  # ‖h after − h before‖
    relative: Tensor  # over ‖h before‖
    tokens: tuple[str, ...]


def stream_change(lm: LanguageModel, edit: Edit, text: str) -> StreamChange:
    """The change of every block's residual stream by `edit`, for one text."""
    rows = tokenise(lm, [text])
    blocks = [lm.architecture.block.format(i) for i in range(lm.layers)]

    @torch.no_grad()
    def look() -> Tensor:
        with Trace(lm.model, blocks) as trace:
            lm.model(**rows.inputs(), use_cache=False)
        return torch.stack([by_token(trace[site].output, 1)[0].double().cpu() for site in blocks])

    before, after = before_and_after(lm, edit, look)
    norm = (after - before).norm(dim=-1)
    tokens = tuple(text[begin:end] for begin, end in rows.offsets[0])
    return StreamChange(norm, norm / before.norm(dim=-1), tokens)


def rank_correlation(
    x: Sequence[float], y: Sequence[float], groups: Sequence[Any] | None = None, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman's ρ of two lists with its 95 % bootstrap interval: (ρ, low, high).

    `groups`: what is drawn together, such as the edit that pairs belong to; None: each pair is drawn alone. Raises
    EditkitError for unequal lengths or fewer than three pairs.
    """
    if not len(x) == len(y) == len(groups if groups is not None else x) or len(x) < 3:
        raise EditkitError(f"A rank correlation of {len(x)} and {len(y)} values: give as many of both, 3 or more.")
    a, b = (torch.tensor(list(map(float, each)), dtype=torch.float64) for each in (x, y))
    names = list(groups) if groups is not None else list(range(len(x)))
    members: dict[Any, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    each = [torch.tensor(found) for found in members.values()]
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(resamples):
        picked = torch.cat([each[i] for i in torch.randint(len(each), (len(each),), generator=generator).tolist()])
        drawn.append(_spearman(a[picked], b[picked]))
    low, high = torch.tensor(drawn, dtype=torch.float64).nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return _spearman(a, b), low, high


def _spearman(x: Tensor, y: Tensor) -> float:
    ranks = torch.stack([_ranks(x), _ranks(y)])
    return torch.corrcoef(ranks)[0, 1].item()


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[inverse]
