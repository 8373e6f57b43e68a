"""One pass over running text: the sums Σ k kᵀ at all asked down-projections, with the place in the text.

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
from tqdm import tqdm

from editkit.corpora import running_text
from editkit.errors import EditkitError, OutputError
from editkit.models.load import LanguageModel
from editkit.models.precision import HALF, widened
from editkit.models.snapshot import uninterrupted
from editkit.moments.moment import PARTIAL_FILE, SecondMoment
from editkit.nethook import Trace
from editkit.settings import MomentSettings
from editkit.tensorfiles import explained, read_tensors, write_tensors

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


@dataclass
class Sums:
    """The state of a pass between two batches: what was summed, and where in the text."""

    products: dict[str, Tensor]  # module → Σ k kᵀ [d_ff, d_ff], of which the lower triangle counts; empty at the start
    norms: dict[str, Tensor]  # module → (Σ‖k‖², Σ‖k‖⁴)
    count: int = 0
    documents: int = 0
    waiting: list[int] = field(default_factory=list)

    def add(self, module: str, k: Tensor) -> None:
        """Add keys [n, d_ff] of any floating dtype, on any device."""
        k = k.double()
        size = k.shape[1]
        if module not in self.products:
            self.products[module] = torch.zeros(size, size, dtype=torch.float64)
            self.norms[module] = torch.zeros(2, dtype=torch.float64)
        width = -(-size // PANELS)
        for start in range(0, size, width):
            panel = slice(start, start + width)
            self.products[module][start:, panel] += (k[:, start:].T @ k[:, panel]).cpu()
        squares = k.square().sum(1)
        self.norms[module] += torch.stack([squares.sum(), squares.square().sum()]).cpu()

    def moment(self, module: str, source: str, provenance: dict[str, Any]) -> SecondMoment:
        """C at `module`, exactly symmetric."""
        lower = self.products[module].tril()
        matrix = (lower + lower.tril(-1).T) / self.count
        second, fourth = self.norms[module].tolist()
        effective = second**2 / fourth if fourth else 0.0
        return SecondMoment(module, matrix, self.count, source, effective, provenance)

    def save(self, path: Path, described: dict[str, Any]) -> None:
        """Write the state, whole or not at all. Raises OutputError."""
        tensors = {f"products.{module}": product for module, product in self.products.items()}
        tensors |= {f"norms.{module}": norm for module, norm in self.norms.items()}
        tensors["waiting"] = torch.tensor(self.waiting, dtype=torch.int64)
        place = {"count": self.count, "documents": self.documents, "modules": sorted(self.products)}
        write_tensors(path, PARTIAL_FILE, described | place, tensors)

    @classmethod
    def load(cls, path: Path, modules: list[str]) -> "Sums":
        """The saved state, with the sums of `modules` alone. Raises EditkitError for a damaged file."""
        header, tensors = read_tensors(path, PARTIAL_FILE, note=False)
        with explained(path, PARTIAL_FILE):
            products, norms = ({m: tensors[f"{what}.{m}"] for m in modules} for what in ("products", "norms"))
            return cls(products, norms, header["count"], header["documents"], tensors["waiting"].tolist())


def collect(
    lm: LanguageModel,
    modules: list[str],
    settings: MomentSettings,
    *,
    seed: int = 0,
    progress: bool = True,
    start: Sums | None = None,
    save: Callable[[Sums], None] | None = None,
) -> Sums:
    """Go over the text until `settings.tokens` keys have been summed at each of `modules`, or the text ends.

    - `seed`: of the order of the text.
    - `start`: the state to continue from; the result has the same bits as that of a pass without a break.
    - `save`: called with the state every SAVE_EVERY seconds, and on Ctrl-C, which waits for the sums of a batch but
      not for its forward pass.

    Raises EditkitError when the text is shorter than one block, or a key is not finite.
    """
    sums = start or Sums({}, {})
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or settings.block
    length = min(settings.block, limit)
    texts = running_text(settings.source, seed=seed)
    blocks = Blocks(lm, texts, length, documents=sums.documents, waiting=sums.waiting)
    rows = max(1, BATCH // length)
    due = time.monotonic() + SAVE_EVERY
    bar = tqdm(
        total=settings.tokens,
        initial=min(sums.count, settings.tokens),
        unit="key",
        unit_scale=True,
        desc="second moments",
        disable=not progress,
        delay=1,
        leave=False,
    )
    with bar, torch.inference_mode(), widened(lm):
        try:
            while sums.count < settings.tokens and (batch := list(islice(blocks, rows))):
                ids = torch.stack(batch).to(lm.device)
                with Trace(lm.model, modules, inputs=True, outputs=False, stop=True) as trace:
                    lm.model(input_ids=ids, use_cache=False)
                # OPT hands its down-projection [rows · tokens, d_ff].
                keys = {m: rearrange(trace[m].input, "... d_ff -> (...) d_ff") for m in modules}
                _require_finite(keys, lm)
                with uninterrupted():
                    for module, k in keys.items():
                        sums.add(module, k)
                    sums.count += ids.numel()
                    sums.documents, sums.waiting = blocks.documents, blocks.waiting
                bar.update(min(ids.numel(), settings.tokens - bar.n))
                if save is not None and time.monotonic() >= due:
                    began = time.monotonic()
                    save(sums)
                    due = time.monotonic() + max(SAVE_EVERY, SAVE_SHARE * (time.monotonic() - began))
        except KeyboardInterrupt:
            if save is not None and sums.count:
                save(sums)
            raise
    if not sums.count:
        raise EditkitError(
            f"The running text '{settings.source}' has fewer than {length} tokens: no second moment can be "
            "collected from it. Give a longer text in moments.source."
        )
    return sums


def saver(path: Path, described: dict[str, Any]) -> Callable[[Sums], None]:
    """`Sums.save` to `path`. A state that cannot be written costs a warning, not the run."""

    def save(sums: Sums) -> None:
        try:
            sums.save(path, described)
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
