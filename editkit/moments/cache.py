"""The cache of second moments: `second_moments` reads it, or collects once however many processes ask.

    CACHE/moments/MODEL/KEY-MODULE.safetensors    C at one module; MODEL is the model's digest, KEY the settings'
    CACHE/moments/MODEL/KEY-MODULE.lock           held while it is collected; the system frees it when its holder dies
    CACHE/moments/MODEL/KEY-MODULES.partial       the state of a pass that is under way, or was killed

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
from editkit.moments.collect import Sums, collect, saver
from editkit.moments.moment import ENOUGH, PARTIAL_FILE, SecondMoment
from editkit.settings import MomentSettings
from editkit.tensorfiles import read_header

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
    Warns when there are fewer than 2 keys per dimension (arXiv 2506.04226). Raises ModelError for a layer the
    model does not have, EditkitError when the text is shorter than one block or a key is not finite.
    """
    settings = settings or MomentSettings()
    modules = {layer: down_of(lm, lm.check_layer(layer)) for layer in dict.fromkeys(layers)}
    store = _Store(lm.digest, settings, seed, cache or cache_folder())
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
    _warn_few(found, settings)
    return {layer: found[module] for layer, module in modules.items()}


def cache_folder() -> Path:
    """Where caches live: `$EDITKIT_CACHE`, else `~/.cache/editkit`."""
    return Path(os.environ.get("EDITKIT_CACHE") or Path.home() / ".cache" / "editkit").expanduser()


def stored_at(moment: SecondMoment, settings: MomentSettings, seed: int, cache: Path) -> Path:
    """Where `second_moments` looks for this moment when it is asked for with `settings` and `seed`."""
    return _Store(moment.provenance["model_digest"], settings, seed, cache).path(moment.module)


class _Store:
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

    def lock(self, modules: list[str], held: ExitStack, progress: bool) -> bool:
        """Hold the modules' locks until `held` ends. False, with a warning, where the cache cannot be written.

        All processes lock in one order, so that two which ask for overlapping layers cannot wait for each other.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for module in sorted(modules):
                lock = FileLock(self.path(module).with_suffix(".lock"))
                try:
                    held.enter_context(lock.acquire(timeout=NOTICE_AFTER))
                except Timeout:
                    if progress:
                        print(f"editkit: another process collects {module}; waiting for it", file=sys.stderr)
                    held.enter_context(lock.acquire())
        except OSError as error:
            warnings.warn(f"second moments are not cached: '{self.folder}' cannot be written: {error}", stacklevel=3)
            return False
        return True

    def collect(self, lm: LanguageModel, modules: list[str], progress: bool, cached: bool) -> dict[str, SecondMoment]:
        """One pass for all `modules`, from where the furthest killed pass over them stopped."""
        provenance: dict[str, Any] = {
            "model": lm.name,
            "model_digest": self.digest,
            "settings": _relevant(self.settings),
            "seed": self.seed,
        }
        if not cached:
            sums = collect(lm, modules, self.settings, seed=self.seed, progress=progress)
            return {m: sums.moment(m, self.settings.source, provenance) for m in modules}
        name = hashlib.sha256("\n".join(sorted(modules)).encode()).hexdigest()[:8]
        partial = self.folder / f"{self.key}-{name}.partial"
        for written in (partial, *map(self.path, modules)):  # what a kill left of a write; we hold the locks
            for left in self.folder.glob(f".{written.name}.*.part"):
                left.unlink(missing_ok=True)
        sums = collect(
            lm,
            modules,
            self.settings,
            seed=self.seed,
            progress=progress,
            start=self._furthest(modules),
            save=saver(partial, provenance),
        )
        found = {m: sums.moment(m, self.settings.source, provenance) for m in modules}
        try:
            for module, moment in found.items():
                moment.save(self.path(module))
        except OutputError as error:
            warnings.warn(f"second moments are not cached: {error}", stacklevel=3)
        for path, header in self._partials():
            if all(self.path(module).exists() for module in header["modules"]):
                path.unlink(missing_ok=True)
        return found

    def _partials(self) -> list[tuple[Path, dict[str, Any]]]:
        found = []
        for path in self.folder.glob(f"{self.key}-*.partial"):
            with suppress(EditkitError):
                found.append((path, read_header(path, PARTIAL_FILE)))
        return found

    def _furthest(self, modules: list[str]) -> Sums | None:
        """The saved state of the pass that got furthest among those over all of `modules`, and maybe more.

        A damaged one is left out, with a warning.
        """
        usable = [
            (header["count"], path) for path, header in self._partials() if set(modules) <= set(header["modules"])
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


def _warn_few(found: dict[str, SecondMoment], settings: MomentSettings) -> None:
    """One warning for the module that has the fewest keys for its size."""
    moment = min(found.values(), key=lambda m: m.vectors_per_dimension, default=None)
    if moment is None or moment.vectors_per_dimension >= ENOUGH:
        return
    fewest = min(moment.routed, default=moment.count)
    needed = ENOUGH * moment.d_ff * (moment.count / max(fewest, 1) if moment.routed else 1)
    remedy = f"Set moments.tokens to {needed:.0f} or more"
    if moment.count < settings.tokens:
        remedy += f", and moments.source to a longer text: '{moment.source}' gave {moment.count} of {settings.tokens}"
    warnings.warn(
        f"The second moment at {moment.module} has {fewest} keys {'of one expert ' if moment.routed else ''}for "
        f"{moment.d_ff} dimensions, which is {moment.vectors_per_dimension:.2g} each; 2 to 10 are needed (arXiv "
        f"2506.04226). {remedy}.",
        stacklevel=3,
    )
