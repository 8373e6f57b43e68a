"""One pass over running text, or over a share of it: Σ k kᵀ at all asked down-projections, and the place in the text.

The forward pass stops after the last of them. On a CPU a half model runs in float32 (models/precision.py). Products
and sums are float64 whatever the model's dtype. Only
the lower triangle is summed, in panels of columns: C is symmetric, and the work falls to little over half.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from editkit.corpora import running_text
from editkit.errors import ConfigError, EditkitError, OutputError
from editkit.models.architecture import experts_in
from editkit.models.experts import expert_keys
from editkit.models.load import LanguageModel
from editkit.models.precision import HALF, widened
from editkit.models.snapshot import uninterrupted
from editkit.moments.group import LostProcessError
from editkit.moments.moment import PARTIAL_FILE, SecondMoment
from editkit.nethook import Trace, get_module
from editkit.progress import Bar
from editkit.settings import MomentSettings
from editkit.tensorfiles import FileKind, explained, read_tensors, write_tensors

BATCH = 2048  # tokens a forward pass
PANELS = 8  # of columns
SAVE_EVERY = 60.0  # seconds between two saves of the state, or
SAVE_SHARE = 20  # times as long as the last save took: 48 layers of GPT-2 XL are 16 GB


class Blocks(Iterator[Tensor]):
    """Token blocks [length] without padding: documents joined, an end token between them.

    - `texts`: the documents, from the first on. `length`: tokens a block.
    - `documents`: how many of them have been read. `waiting`: their tokens that no block has had yet. Blocks made with
      these two of another continue with its next block.
    """

    def __init__(
        self,
        lm: LanguageModel,
        texts: Iterator[str],
        length: int,
        *,
        documents: int = 0,
        waiting: list[int] | None = None,
    ) -> None:
        self._lm, self._length = lm, length
        self._texts = islice(texts, documents, None)
        self._read, self._used = list(waiting or []), 0
        self.documents = documents  # read so far

    @property
    def waiting(self) -> list[int]:
        """Tokens of those documents that no block has had yet."""
        return self._read[self._used :]

    def __next__(self) -> Tensor:
        end = self._lm.tokenizer.eos_token_id
        while len(self._read) - self._used < self._length:
            text = next(self._texts)
            self._read, self._used = self.waiting, 0
            self._read += self._lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if end is not None:
                self._read.append(end)
            self.documents += 1
        self._used += self._length
        return torch.tensor(self._read[self._used - self._length : self._used])


def packed_blocks(lm: LanguageModel, texts: Iterator[str], length: int) -> Iterator[Tensor]:
    """Token blocks [length] without padding: documents joined, an end token between them."""
    return Blocks(lm, texts, length)


@dataclass(frozen=True)
class Share:
    """Which batches of the text a process takes: those at rank, rank + of, rank + 2 · of, …

    All processes read and tokenise the whole text, which takes next to no time beside the forward passes. So all
    shares together are the batches of one process: the same blocks, in the same passes of the model.
    """

    rank: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.of:
            raise ConfigError(f"A share must be i/n with 0 ≤ i < n; found {self}.")

    def __str__(self) -> str:
        return f"{self.rank}/{self.of}"

    def takes(self, batch: int) -> bool:
        """Whether batch number `batch` of the text belongs to this share."""
        return batch % self.of == self.rank

    def behind(self, taken: int) -> int:
        """How many batches of the text are behind a process that has taken `taken` of them."""
        return (taken - 1) * self.of + self.rank + 1 if taken else 0


ALONE = Share()


@dataclass
class Sums:
    """The state of a pass between two batches: what was summed, and where in the text."""

    products: dict[str, Tensor]  # module → Σ k kᵀ [d_ff, d_ff], of which the lower triangle counts; empty at the start
    norms: dict[str, Tensor]  # module → (Σ‖k‖², Σ‖k‖⁴)
    routed: dict[str, Tensor] = field(default_factory=dict)  # experts → how many tokens each had [E]
    count: int = 0
    documents: int = 0
    waiting: list[int] = field(default_factory=list)

    def add(self, module: str, k: Tensor) -> None:
        """Add keys [n, d_ff] of any floating dtype, on any device."""
        k = k.double()
        size = k.shape[1]
        if module not in self.products:
            self.products[module] = _zeros(size, size)
        _add_products(self.products[module], k)
        self._add_norms(module, k.square().sum(1))

    def add_experts(self, module: str, experts: int, chosen: Tensor, keys: Tensor) -> None:
        """Add g_e k_e [n, chosen, d_ff] of n tokens, each to the block of its expert. `experts`: how many there are;
        `chosen` [n, chosen]: which."""
        keys = keys.double()
        size = keys.shape[-1]
        if module not in self.products:
            self.products[module] = _zeros(experts, size, size)
            self.routed[module] = torch.zeros(experts, dtype=torch.int64)
        for expert in chosen.unique().tolist():
            of_expert = keys[chosen == expert]
            _add_products(self.products[module][expert], of_expert)
            self.routed[module][expert] += len(of_expert)
        self._add_norms(module, keys.square().sum((1, 2)))

    def _add_norms(self, module: str, squares: Tensor) -> None:
        """`squares` [n]: ‖k‖² of each key."""
        norms = torch.stack([squares.sum(), squares.square().sum()]).cpu()
        self.norms[module] = self.norms[module] + norms if module in self.norms else norms

    def merge(self, other: "Sums") -> None:
        """Add the sums of another share of the same text. This one's place in the text stays."""
        for module, product in other.products.items():
            if module in self.products:
                self.products[module] += product
                self.norms[module] += other.norms[module]
            else:
                self.products[module], self.norms[module] = product, other.norms[module]
        for module, counts in other.routed.items():
            self.routed[module] = self.routed[module] + counts if module in self.routed else counts
        self.count += other.count

    def pop(self, module: str, source: str, provenance: dict[str, Any]) -> SecondMoment:
        """C at `module`, exactly symmetric; made of its sums in their memory, so that they are no longer here."""
        matrix = self.products.pop(module)
        size = matrix.shape[-1]
        width = -(-size // PANELS)
        for start in range(0, size, width):
            here, later = slice(start, start + width), slice(start + width, None)
            lower = matrix[..., here, here].tril()
            matrix[..., here, here] = lower + lower.tril(-1).mT
            matrix[..., here, later] = matrix[..., later, here].mT
        matrix /= self.count
        second, fourth = self.norms[module].tolist()
        effective = second**2 / fourth if fourth else 0.0
        routed = tuple(self.routed[module].tolist()) if module in self.routed else ()
        return SecondMoment(module, matrix, self.count, source, effective, provenance, routed)

    def save(self, path: Path, described: dict[str, Any], kind: FileKind = PARTIAL_FILE) -> None:
        """Write the state, whole or not at all, with what `described` says of it. Raises OutputError."""
        tensors = {f"products.{module}": product for module, product in self.products.items()}
        tensors |= {f"norms.{module}": norm for module, norm in self.norms.items()}
        tensors |= {f"routed.{module}": counts for module, counts in self.routed.items()}
        tensors["waiting"] = torch.tensor(self.waiting, dtype=torch.int64)
        place = {"count": self.count, "documents": self.documents, "modules": sorted(self.products)}
        write_tensors(path, kind, place | described, tensors)

    @classmethod
    def load(cls, path: Path, modules: list[str], kind: FileKind = PARTIAL_FILE) -> "Sums":
        """The saved state, with the sums of `modules` alone. Raises EditkitError for a damaged file."""
        header, tensors = read_tensors(path, kind, note=False)
        with explained(path, kind):
            modules = modules if header["count"] else []  # a share without a batch has no sums
            products, norms = ({m: tensors[f"{what}.{m}"] for m in modules} for what in ("products", "norms"))
            routed = {m: tensors[f"routed.{m}"] for m in modules if f"routed.{m}" in tensors}
            return cls(products, norms, routed, header["count"], header["documents"], tensors["waiting"].tolist())


def _zeros(*shape: int) -> Tensor:
    """In float64, and not of inference mode, in which keys are collected: C is made in their memory later."""
    with torch.inference_mode(False):
        return torch.zeros(*shape, dtype=torch.float64)


def _add_products(products: Tensor, k: Tensor) -> None:
    """Add the lower triangle of Σ k kᵀ over k [n, size] to `products` [size, size], panel by panel."""
    size = k.shape[1]
    width = -(-size // PANELS)
    for start in range(0, size, width):
        panel = slice(start, start + width)
        products[start:, panel] += (k[:, start:].T @ k[:, panel]).cpu()


def collect(
    lm: LanguageModel,
    modules: list[str],
    settings: MomentSettings,
    *,
    seed: int = 0,
    progress: bool = True,
    start: Sums | None = None,
    save: Callable[[Sums], None] | None = None,
    share: Share = ALONE,
    together: Callable[[int], int] | None = None,
) -> Sums:
    """Go over the text until `settings.tokens` keys have been summed at each of `modules`, or the text ends.

    - `settings`: with the number of keys, as `amount.resolved` gives them.
    - `seed`: of the order of the text.
    - `progress`: whether to show a bar.
    - `start`: the state to continue from; the result has the same bits as that of a pass without a break.
    - `save`: called with the state every SAVE_EVERY seconds, and on Ctrl-C, which waits for the sums of a batch but
      not for its forward pass.
    - `share`: the batches to take. The pass ends where that of one process ends: all shares together have its keys.
    - `together`: given after each batch how many keys this process has summed; says how many all processes have.

    Raises EditkitError when the text is shorter than one block, or a key is not finite.
    """
    tokens = settings.tokens
    assert tokens is not None  # resolved
    sums = start or Sums({}, {})
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or settings.block
    length = min(settings.block, limit)
    texts = running_text(settings.source, seed=seed)
    blocks = Blocks(lm, texts, length, documents=sums.documents, waiting=sums.waiting)
    rows = max(1, BATCH // length)
    behind = share.behind(-(-sums.count // (rows * length)))  # batches of the text; only its last may be smaller
    goal = tokens if together is not None else -(-tokens // share.of)
    due = time.monotonic() + SAVE_EVERY
    bar = Bar(
        total=goal,
        initial=min(sums.count, goal),
        unit="key",
        unit_scale=True,
        desc="second moments",
        disable=not progress,
        delay=1,
        leave=False,
    )
    with bar, torch.inference_mode(), widened(lm):
        try:
            while behind * rows * length < tokens and (batch := list(islice(blocks, rows))):
                behind += 1
                if not share.takes(behind - 1):
                    continue
                ids = torch.stack(batch).to(lm.device)
                with Trace(lm.model, modules, inputs=True, outputs=False, stop=True) as trace:
                    lm.model(input_ids=ids, use_cache=False)
                # OPT hands its down-projection [rows · tokens, d_ff], as experts are handed x [rows · tokens, d_model].
                given = {m: rearrange(trace[m].input, "... d -> (...) d") for m in modules}
                _require_finite(given, lm)
                with uninterrupted():
                    for module, each in given.items():
                        experts = experts_in(get_module(lm.model, module))
                        if experts is None:
                            sums.add(module, each)
                        else:
                            routed, keys = expert_keys(lm, module, each)
                            sums.add_experts(module, experts, routed.experts, keys)
                    sums.count += ids.numel()
                    sums.documents, sums.waiting = blocks.documents, blocks.waiting
                done = sums.count if together is None else together(sums.count)
                bar.update(min(done, goal) - bar.done)
                if save is not None and time.monotonic() >= due:
                    began = time.monotonic()
                    save(sums)
                    due = time.monotonic() + max(SAVE_EVERY, SAVE_SHARE * (time.monotonic() - began))
        except (KeyboardInterrupt, LostProcessError):
            if save is not None and sums.count:
                save(sums)
            raise
    if not behind:
        raise EditkitError(
            f"The running text '{settings.source}' has fewer than {length} tokens: no second moment can be "
            "collected from it. Give a longer text in moments.source."
        )
    return sums


def saver(path: Path, described: dict[str, Any], kind: FileKind = PARTIAL_FILE) -> Callable[[Sums], None]:
    """`Sums.save` to `path`. A state that cannot be written costs a warning, not the run."""

    def save(sums: Sums) -> None:
        try:
            sums.save(path, described, kind)
        except OutputError as error:
            warnings.warn(f"a killed collection would start again: {error}", stacklevel=2)

    return save


def _require_finite(keys: dict[str, Tensor], lm: LanguageModel) -> None:
    for module, k in keys.items():
        if not k.isfinite().all():
            remedy = "Load the model in bfloat16 or float32 (model.dtype), and check" if lm.dtype in HALF else "Check"
            raise EditkitError(
                f"A key at {module} is not finite in {str(lm.dtype).removeprefix('torch.')}: no second moment can be "
                f"collected. {remedy} its weights."
            )
