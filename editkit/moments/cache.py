"""The cache of second moments: `second_moments` reads it, or collects once however many processes ask.

    CACHE/moments/MODEL/KEY-MODULE.safetensors    C at one module; MODEL is the model's digest, KEY the settings'
    CACHE/moments/MODEL/KEY-MODULE.lock           held while it is collected; the system frees it when its holder dies
    CACHE/moments/MODEL/KEY-MODULES.partial       the state of a pass that is under way, or was killed
    CACHE/moments/MODEL/KEY-MODULES-1of4.shard    the same of one share of a pass, for the second of four processes

So an edited model never reads the moments of another, and a killed pass is gone on with by whoever asks next.
"""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from editkit.corpora import source_digest
from editkit.errors import EditkitError, OutputError
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.moments.amount import resolved
from editkit.moments.collect import Sums, collect, saver
from editkit.moments.moment import ENOUGH, PARTIAL_FILE, SHARD_FILE, SecondMoment
from editkit.settings import MomentSettings
from editkit.tensorfiles import MAPPED, FileKind, read_header

VERSION = 2  # of what is collected: change it and no old cache is read
IMPORTED = "imported:"  # the source of moments that `python -m editkit.moments import` put into the cache
NOTICE_AFTER = 1.0  # seconds of waiting for another process


@in_eval_mode
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

    `cache` is a folder (default `$EDITKIT_CACHE`, else `~/.cache/editkit`). A pass that was killed is gone on with,
    and gives the same bits as if it had not been. Another process that collects the same is waited for.
    Where `settings` give no number of keys, it is `keys_wanted(lm)`.
    Warns when there are fewer than 2 keys per dimension (arXiv 2506.04226). Raises ModelError for a layer the
    model does not have, EditkitError when the text is shorter than one block or a key is not finite.
    """
    settings = resolved(lm, settings or MomentSettings())
    modules = {layer: down_of(lm, lm.check_layer(layer)) for layer in dict.fromkeys(layers)}
    store = Store(lm.digest, settings, seed, cache or cache_folder())
    found = store.read(modules.values())
    if missing := [module for module in modules.values() if module not in found]:
        if settings.source.startswith(IMPORTED):
            raise EditkitError(
                f"No second moment named '{settings.source.removeprefix(IMPORTED)}' was imported for {missing[0]} of "
                f"this very model ({lm.name}). Bring one in with `python -m editkit.moments import`, or collect it "
                "from a text in moments.source."
            )
        with ExitStack() as held:
            cached = store.lock(missing, held, progress)
            found |= store.read(missing, warn=True)
            if missing := [module for module in missing if module not in found]:
                found |= store.collect(lm, missing, progress, cached)
    warn_few(found, settings)
    return {layer: found[module] for layer, module in modules.items()}


def cache_folder() -> Path:
    """Where caches live: `$EDITKIT_CACHE`, else `~/.cache/editkit`."""
    return Path(os.environ.get("EDITKIT_CACHE") or Path.home() / ".cache" / "editkit").expanduser()


def stored_at(moment: SecondMoment, settings: MomentSettings, seed: int, cache: Path) -> Path:
    """Where `second_moments` looks for this moment when it is asked for with `settings` (resolved) and `seed`."""
    return Store(moment.provenance["model_digest"], settings, seed, cache).path(moment.module)


class Store:
    """The part of the cache that belongs to one model, one text and one way of reading it."""

    def __init__(self, digest: str, settings: MomentSettings, seed: int, cache: Path) -> None:
        self.digest, self.settings, self.seed = digest, settings, seed
        self.folder = cache / "moments" / digest[:16]
        self.key = _key(settings, seed)

    def path(self, module: str) -> Path:
        return self.folder / f"{self.key}-{module}.safetensors"

    def read(self, modules: Iterable[str], *, warn: bool = False) -> dict[str, SecondMoment]:
        """Those that are there. Damaged files count as missing, with a warning where they are about to be replaced."""
        found = {}
        for module in modules:
            if self.path(module).exists():
                try:
                    found[module] = SecondMoment.load(self.path(module))
                except EditkitError as error:
                    if warn:
                        warnings.warn(f"collected again: {error}", stacklevel=3)
        return found

    def lock(self, modules: list[str], held: ExitStack, progress: bool, *, wait: bool = True) -> bool:
        """Hold the modules' locks until `held` ends. False, with a warning, where the cache cannot be written.

        All processes lock in one order, so that two which ask for overlapping layers cannot wait for each other.
        Without `wait`, raises EditkitError where another process has one of them.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for module in sorted(modules):
                lock = FileLock(self.path(module).with_suffix(".lock"))
                try:
                    held.enter_context(lock.acquire(timeout=NOTICE_AFTER))
                except Timeout:
                    if not wait:
                        raise EditkitError(
                            f"Another process collects the second moment at {module}. Start again when it is done."
                        ) from None
                    if progress:
                        print(f"editkit: another process collects {module}; waiting for it", file=sys.stderr)
                    held.enter_context(lock.acquire())
        except OSError as error:
            warnings.warn(f"second moments are not cached: '{self.folder}' cannot be written: {error}", stacklevel=3)
            return False
        return True

    def collect(self, lm: LanguageModel, modules: list[str], progress: bool, cached: bool) -> dict[str, SecondMoment]:
        """One pass for all `modules`, from where the furthest killed pass over them stopped."""
        provenance = self.provenance(lm)
        if not cached:
            sums = collect(lm, modules, self.settings, seed=self.seed, progress=progress)
            return {m: sums.pop(m, self.settings.source, provenance) for m in modules}
        partial = self.folder / f"{self.stem(modules)}.partial"
        self.tidy(partial, *map(self.path, modules))
        for path, header in self.unfinished("*.shard", SHARD_FILE):
            if set(modules) <= set(header["modules"]):
                warnings.warn(
                    f"'{path}' belongs to an unfinished collection over {header['share'][1]} processes. One process "
                    "alone does not go on with it, and collects all keys anew.",
                    stacklevel=4,
                )
                break
        sums = collect(
            lm,
            modules,
            self.settings,
            seed=self.seed,
            progress=progress,
            start=self._furthest(modules),
            save=saver(partial, provenance),
        )
        return self.keep(sums, modules, provenance)

    def keep(self, sums: Sums, modules: list[str], provenance: dict[str, Any]) -> dict[str, SecondMoment]:
        """The moments, in the cache where it can be written; unfinished collections of what is now there go. `sums` is
        emptied on the way, and a large moment is read from its file: memory does not hold all of them."""
        found, unwritten = {}, None
        for module in modules:
            found[module] = sums.pop(module, self.settings.source, provenance)
            try:
                found[module].save(self.path(module))
            except OutputError as error:
                unwritten = error
            else:
                if found[module].matrix.nbytes >= MAPPED:
                    found[module] = SecondMoment.load(self.path(module))
        if unwritten is not None:
            warnings.warn(f"second moments are not cached: {unwritten}", stacklevel=3)
        for path, header in [*self.unfinished("*.partial", PARTIAL_FILE), *self.unfinished("*.shard", SHARD_FILE)]:
            if all(self.path(module).exists() for module in header["modules"]):
                path.unlink(missing_ok=True)
        return found

    def provenance(self, lm: LanguageModel) -> dict[str, Any]:
        """How the moments are collected, as JSON."""
        return {
            "model": lm.name,
            "model_digest": self.digest,
            "settings": _relevant(self.settings),
            "seed": self.seed,
        }

    def stem(self, modules: list[str]) -> str:
        """How the names of files about a pass over `modules` begin."""
        return f"{self.key}-{hashlib.sha256(chr(10).join(sorted(modules)).encode()).hexdigest()[:8]}"

    def tidy(self, *written: Path) -> None:
        """Delete what a kill left of a write of these files, whose locks are held."""
        for path in written:
            for left in self.folder.glob(f".{path.name}.*.part"):
                left.unlink(missing_ok=True)

    def unfinished(self, names: str, kind: FileKind) -> list[tuple[Path, dict[str, Any]]]:
        """The files of passes that are under way or were killed, with their headers. `names`: a pattern."""
        found = []
        for path in self.folder.glob(f"{self.key}-{names}"):
            with suppress(EditkitError):
                found.append((path, read_header(path, kind)))
        return found

    def _furthest(self, modules: list[str]) -> Sums | None:
        """The saved state of the pass that got furthest among those over all of `modules`, and maybe more.

        A damaged one is left out, with a warning.
        """
        usable = [
            (header["count"], path)
            for path, header in self.unfinished("*.partial", PARTIAL_FILE)
            if set(modules) <= set(header["modules"])
        ]
        for _, path in sorted(usable, reverse=True):
            try:
                return Sums.load(path, modules)
            except EditkitError as error:
                warnings.warn(f"an unfinished collection is not continued: {error}", stacklevel=3)
        return None


def _relevant(settings: MomentSettings) -> dict[str, Any]:
    """The settings that decide what is collected. An imported moment was collected elsewhere, in its own way."""
    if settings.source.startswith(IMPORTED):
        return {"source": settings.source}
    return {name: value for name, value in asdict(settings).items() if name not in ("ridge", "enabled")}


def _key(settings: MomentSettings, seed: int) -> str:
    relevant = _relevant(settings) | {"version": VERSION}
    if not settings.source.startswith(IMPORTED):
        relevant |= {"seed": seed, "content": source_digest(settings.source)}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:24]


def warn_few(found: dict[str, SecondMoment], settings: MomentSettings) -> None:
    """One warning for the module that has the fewest keys for its size."""
    moment = min(found.values(), key=lambda m: m.vectors_per_dimension, default=None)
    if moment is None or moment.vectors_per_dimension >= ENOUGH:
        return
    fewest = min(moment.routed, default=moment.count)
    needed = ENOUGH * moment.d_ff * (moment.count / max(fewest, 1) if moment.routed else 1)
    remedy = f"Set moments.tokens to {needed:.0f} or more"
    if settings.tokens is not None and moment.count < settings.tokens:
        remedy += f", and moments.source to a longer text: '{moment.source}' gave {moment.count} of {settings.tokens}"
    warnings.warn(
        f"The second moment at {moment.module} has {fewest} keys {'of one expert ' if moment.routed else ''}for "
        f"{moment.d_ff} dimensions, which is {moment.vectors_per_dimension:.2g} each; 2 to 10 are needed (arXiv "
        f"2506.04226). {remedy}.",
        stacklevel=3,
    )
