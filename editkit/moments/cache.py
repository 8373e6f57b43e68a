"""Second moments C = E[k kᵀ] of the keys of a down-projection, over running text.

k [d_ff] is the input of the down-projection. One pass over the text serves all asked layers and stops after
the last of them. Sums are kept in float64. A result is cached under the digest of the model, the module
and the settings, so an edited model never reads the moments of another.
"""

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from tqdm import tqdm

from editkit.corpora import running_text
from editkit.errors import EditkitError, OutputError
from editkit.files import write_bytes
from editkit.models.load import LanguageModel
from editkit.nethook import Trace
from editkit.settings import MomentSettings

VERSION = 1  # of what is collected: change it and no old cache is read


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """C = E[k kᵀ] [d_ff, d_ff] in float64, uncentred, over `count` keys at `module`."""

    module: str
    matrix: Tensor
    count: int
    source: str

    @functools.cached_property
    def vectors_per_dimension(self) -> float:
        """Keys per dimension of d_ff: 2 to 10 suffice (arXiv 2506.04226); below 1, C is singular."""
        return self.count / self.matrix.shape[0]

    def factor(self, ridge: float = 0.0) -> "Factored":
        """Cholesky factor of C + ridge · mean(diag C) · I.

        Raises EditkitError when it is not positive definite, saying how many keys there were.
        """
        size = self.matrix.shape[0]
        shift = ridge * self.matrix.diagonal().mean()
        ridged = self.matrix + shift * torch.eye(size, dtype=self.matrix.dtype)
        lower, failed = torch.linalg.cholesky_ex(ridged)
        if failed:
            raise EditkitError(
                f"The second moment at {self.module} is singular: {self.count} keys for {size} dimensions, ridge "
                f"{ridge:g}. Collect at least {2 * size} (moments.tokens), or set moments.ridge to 1e-4 or more."
            )
        return Factored(lower)


@dataclass(frozen=True, eq=False)
class Factored:
    """A lower Cholesky factor of C (float64). Solving with it never forms an inverse."""

    lower: Tensor

    def solve(self, keys: Tensor) -> Tensor:
        """C⁻¹ k for keys [d_ff] or [d_ff, n], in float64 on the CPU."""
        k = keys.detach().double().cpu()
        solved = torch.cholesky_solve(k[:, None] if k.ndim == 1 else k, self.lower)
        return solved[:, 0] if k.ndim == 1 else solved

    @functools.cached_property
    def condition(self) -> float:
        """Condition number of the factored matrix (largest over smallest eigenvalue)."""
        values = torch.linalg.svdvals(self.lower)
        return (values[0] / values[-1]).item() ** 2


class Identity(Factored):
    """C = I: what some ports of ROME use, and a null control."""

    def __init__(self) -> None:
        super().__init__(torch.eye(1, dtype=torch.float64))

    def solve(self, keys: Tensor) -> Tensor:
        return keys.detach().double().cpu()


def second_moments(
    lm: LanguageModel,
    layers: Sequence[int],
    settings: MomentSettings | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
    cache: Path | None = None,
) -> dict[int, SecondMoment]:
    """Second moments at the down-projections of `layers`, from the cache or from one pass over the text.

    `cache` is a folder (default `$EDITKIT_CACHE`, else `~/.cache/editkit`). Raises ModelError for a layer
    the model does not have, EditkitError when the text is shorter than one block.
    """
    settings = settings or MomentSettings()
    cache = cache or cache_folder()
    digest = lm.digest
    found: dict[int, SecondMoment] = {}
    paths = {}
    for layer in dict.fromkeys(layers):
        module = lm.architecture.down(lm.check_layer(layer))
        paths[layer] = cache / "moments" / digest[:16] / f"{_cache_key(module, settings, seed)}.safetensors"
        cached = _read(paths[layer], module)
        if cached is not None:
            found[layer] = cached
    missing = [layer for layer in paths if layer not in found]
    if missing:
        for layer, moment in _collect(lm, missing, settings, seed, progress).items():
            found[layer] = moment
            _write(paths[layer], moment)
    return {layer: found[layer] for layer in paths}


def cache_folder() -> Path:
    """Where caches live: `$EDITKIT_CACHE`, else `~/.cache/editkit`."""
    return Path(os.environ.get("EDITKIT_CACHE") or Path.home() / ".cache" / "editkit").expanduser()


def packed_blocks(lm: LanguageModel, texts: Iterator[str], length: int) -> Iterator[Tensor]:
    """Token blocks [length] without padding: documents joined, an end token between them."""
    end = lm.tokenizer.eos_token_id
    waiting: list[int] = []
    for text in texts:
        waiting += lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            waiting.append(end)
        while len(waiting) >= length:
            yield torch.tensor(waiting[:length])
            waiting = waiting[length:]


def _collect(
    lm: LanguageModel, layers: list[int], settings: MomentSettings, seed: int, progress: bool
) -> dict[int, SecondMoment]:
    sites = {layer: lm.architecture.down(layer) for layer in layers}
    sums: dict[int, Tensor] = {}
    count = 0
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or settings.block
    length = min(settings.block, limit)
    blocks = packed_blocks(lm, running_text(settings.source, seed=seed), length)
    bar = tqdm(total=settings.tokens, unit="key", desc="second moments", disable=not progress, delay=1, leave=False)
    with bar, torch.inference_mode():
        for batch in _batched(blocks, max(1, 2048 // length)):
            ids = torch.stack(batch).to(lm.device)
            with Trace(lm.model, list(sites.values()), inputs=True, outputs=False, stop=True) as trace:
                lm.model(input_ids=ids, use_cache=False)
            for layer, site in sites.items():
                k = rearrange(trace[site].input, "rows tokens d_ff -> (rows tokens) d_ff").double()
                product = (k.T @ k).cpu()
                sums[layer] = sums[layer] + product if layer in sums else product
            count += ids.numel()
            bar.update(min(ids.numel(), settings.tokens - bar.n))
            if count >= settings.tokens:
                break
    if not count:
        raise EditkitError(
            f"The running text '{settings.source}' has fewer than {length} tokens: no second moment can be "
            "collected from it. Give a longer text in moments.source."
        )
    return {layer: SecondMoment(sites[layer], sums[layer] / count, count, settings.source) for layer in layers}


def _batched(blocks: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    batch = []
    for block in blocks:
        batch.append(block)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _cache_key(module: str, settings: MomentSettings, seed: int) -> str:
    relevant = {k: v for k, v in asdict(settings).items() if k not in ("ridge", "enabled")}
    relevant |= {"module": module, "seed": seed, "version": VERSION}
    if (source := Path(settings.source).expanduser()).is_file():
        relevant["content"] = hashlib.sha256(source.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:24]


def _read(path: Path, module: str) -> SecondMoment | None:
    """The cached moment, or None when there is none or it cannot be used."""
    try:
        tensors = load_tensors(path.read_bytes())
    except (OSError, SafetensorError):
        return None
    return SecondMoment(module, tensors["matrix"], int(tensors["count"]), bytes(tensors["source"].tolist()).decode())


def _write(path: Path, moment: SecondMoment) -> None:
    """Cache the moment. A cache that cannot be written costs time, not the run."""
    tensors = {
        "matrix": moment.matrix.contiguous(),
        "count": torch.tensor(moment.count),
        "source": torch.tensor(list(moment.source.encode()), dtype=torch.uint8),
    }
    try:
        write_bytes(path, save_tensors(tensors))
    except OutputError as error:
        warnings.warn(f"second moments are not cached: {error}", stacklevel=2)
