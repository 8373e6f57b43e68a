"""One collection shared between processes, each of which goes on after a kill from its own file.

    torchrun --nproc-per-node 2 -m editkit.moments collect --model … --layers 4,5,6,7,8      # on one machine or more
    python -m editkit.moments collect --model … --shard $SLURM_ARRAY_TASK_ID/8               # in an array of jobs

Process i of n takes the batches i, i + n, i + 2n, … of the text (`collect.Share`), which are those of one process:
the same blocks, in the same passes of the model. So the number of keys is exactly that of one process, and C differs
from its C only by the order in which float64 sums are added, by about 1e-16 of it.

Each process writes its sums to a file in the cache, which all must share. With torchrun process 0 adds them, once all
have finished; in an array the job that finishes last does. The files are added in the order of their numbers, so the
result has the same bits whatever was killed. The number of processes is part of a file's name and header: another
number does not go on with them, and is refused.
"""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock, Timeout

from editkit.errors import EditkitError, OutputError
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.moments.amount import resolved
from editkit.moments.cache import IMPORTED, NOTICE_AFTER, Store, cache_folder, warn_few
from editkit.moments.collect import Share, Sums, collect, saver
from editkit.moments.group import Group
from editkit.moments.moment import PARTIAL_FILE, SHARD_FILE, SecondMoment
from editkit.settings import MomentSettings
from editkit.tensorfiles import read_header


def collect_together(
    lm: LanguageModel,
    layers: Sequence[int],
    settings: MomentSettings | None = None,
    *,
    group: Group,
    seed: int = 0,
    progress: bool = True,
    cache: Path | None = None,
) -> dict[int, SecondMoment]:
    """Second moments at the down-projections of `layers`, collected by all processes of `group`; each calls this.

    - `layers`, `settings`, `seed`, `cache`: as for `second_moments`, which then finds the result in the cache.
    - `progress`: whether process 0 shows a bar, which counts the keys of all.

    Raises what `second_moments` raises; EditkitError where an unfinished collection over another number of processes is
    in the cache, or another process collects the same; LostProcessError when a process of the group ends before it is
    done; OutputError where the cache cannot be written.
    """
    share = Share(group.rank, group.size)
    store, modules, settings = _asked(lm, layers, settings, seed, cache)
    with ExitStack() as held:
        # 1) what is missing: process 0 holds the modules' locks for all
        missing = group.of_first(lambda: _missing(store, list(modules.values()), share, held))
        if missing:
            # 2) this process's share
            shard = _Shard(store, lm, missing, share)
            group.agree(f"{store.digest[:16]}/{shard.path.name.rpartition('-')[0]}", lambda: shard.lock(held))
            shard.collect(progress and group.rank == 0, group)
            group.finish(shard.count)
            # 3) the sum of all
            group.of_first(shard.add_up)
    return _read(store, modules, settings)


def collect_share(
    lm: LanguageModel,
    layers: Sequence[int],
    settings: MomentSettings | None = None,
    *,
    share: Share,
    seed: int = 0,
    progress: bool = True,
    cache: Path | None = None,
) -> dict[int, SecondMoment]:
    """Collect one share, and add all up where it was the last: for an array of jobs that know nothing of each other.

    - `layers`, `settings`, `seed`, `progress`, `cache`: as for `second_moments`, which then finds the result.
    - `share`: the one to collect. Those of the other shares may run at any time, or at the same time.

    Returns the moments by layer, {} where other shares are unfinished. Raises as `collect_together` does.
    """
    store, modules, settings = _asked(lm, layers, settings, seed, cache)
    with ExitStack() as held:
        missing = _missing(store, list(modules.values()), share, None)
        if missing:
            shard = _Shard(store, lm, missing, share)
            shard.lock(held)
            shard.collect(progress)
            _hold(store, missing, held, wait=True)
            if len(store.read(modules.values())) < len(modules):  # else another was as late, and has added all up
                if not shard.all_finished():
                    return {}
                shard.add_up()
    return _read(store, modules, settings)


class _Shard:
    """The share of one process in a pass over `modules`, and its file."""

    def __init__(self, store: Store, lm: LanguageModel, modules: list[str], share: Share) -> None:
        self._store, self._lm, self._modules, self._share = store, lm, modules, share
        self.path, self.count = self._path(share.rank), 0

    def _path(self, rank: int) -> Path:
        return self._store.folder / f"{self._store.stem(self._modules)}-{rank}of{self._share.of}.shard"

    def lock(self, held: ExitStack) -> None:
        """Hold this share until `held` ends. Raises EditkitError where another process has it."""
        try:
            self._store.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(self.path.with_suffix(".lock")).acquire(timeout=NOTICE_AFTER))
        except Timeout:
            raise EditkitError(
                f"Another process collects share {self._share} already ('{self.path}'). Wait for it, or give each "
                "process a share of its own."
            ) from None
        except OSError as error:
            raise OutputError(f"'{self._store.folder}' cannot be written: {error}. Shares need a cache.") from error
        self._store.tidy(self.path)

    def collect(self, progress: bool, group: Group | None = None) -> None:
        """Collect this share from where it stopped, and write it, finished. Raises OutputError."""
        start = None
        if self.path.exists():
            try:
                start = Sums.load(self.path, self._modules, SHARD_FILE)
                self.count = start.count
                if self._finished(self._share.rank):
                    return
            except EditkitError as error:
                warnings.warn(f"an unfinished share is not continued: {error}", stacklevel=3)
        sums = collect(
            self._lm,
            self._modules,
            self._store.settings,
            seed=self._store.seed,
            progress=progress,
            start=start,
            save=saver(self.path, self._described(finished=False), SHARD_FILE),
            share=self._share,
            together=group.total if group else None,
        )
        sums.save(self.path, self._described(finished=True), SHARD_FILE)
        self.count = sums.count

    def all_finished(self) -> bool:
        return all(self._finished(rank) for rank in range(self._share.of))

    def add_up(self) -> None:
        """Put the moments of all shares together into the cache. Raises EditkitError where a share is not there."""
        total = Sums({}, {})
        for rank in range(self._share.of):
            if not self._finished(rank):
                raise EditkitError(
                    f"Share {rank}/{self._share.of} is not in '{self._store.folder}'. All processes need one cache: "
                    "set EDITKIT_CACHE to a folder that every machine has."
                )
            total.merge(Sums.load(self._path(rank), self._modules, SHARD_FILE))
        self._store.keep(total, self._modules, self._store.provenance(self._lm) | {"processes": self._share.of})
        if absent := [module for module in self._modules if not self._store.path(module).exists()]:
            raise OutputError(f"The second moment at {absent[0]} cannot be written; the shares' sums are kept.")

    def _finished(self, rank: int) -> bool:
        return self._path(rank).exists() and bool(read_header(self._path(rank), SHARD_FILE)["finished"])

    def _described(self, *, finished: bool) -> dict[str, object]:
        share = [self._share.rank, self._share.of]
        return self._store.provenance(self._lm) | {"modules": self._modules, "share": share, "finished": finished}


def _asked(
    lm: LanguageModel, layers: Sequence[int], settings: MomentSettings | None, seed: int, cache: Path | None
) -> tuple[Store, dict[int, str], MomentSettings]:
    """The cache, the modules by layer, and the settings with their number of keys."""
    settings = resolved(lm, settings or MomentSettings())
    if settings.source.startswith(IMPORTED):
        raise EditkitError(f"moments.source={settings.source} was imported: there is nothing to collect. Name a text.")
    modules = {layer: down_of(lm, lm.check_layer(layer)) for layer in dict.fromkeys(layers)}
    return Store(lm.digest, settings, seed, cache or cache_folder()), modules, settings


def _missing(store: Store, modules: list[str], share: Share, held: ExitStack | None) -> list[str]:
    """The modules to collect: those that the cache lacks, with those of an unfinished collection that has them all.

    `held`: where to keep the modules' locks; None takes none. Raises EditkitError where another number of processes
    has begun, or where another process holds the locks.
    """
    if len(store.read(modules)) == len(modules):
        return []
    if held is not None:
        _hold(store, modules, held, wait=False)
    missing = sorted(set(modules) - set(store.read(modules, warn=True)))
    begun = [(path, header, header["share"][1]) for path, header in store.unfinished("*.shard", SHARD_FILE)]
    begun += [(path, header, 1) for path, header in store.unfinished("*.partial", PARTIAL_FILE)]
    begun = [each for each in begun if missing and set(missing) <= set(each[1]["modules"])]
    for _, header, of in begun:
        if of == share.of:
            return list(header["modules"])
    if begun:
        path, header, of = max(begun, key=lambda each: int(each[1]["count"]))
        stem = path.stem.rpartition("-")[0] + f"-*of{of}.shard" if of > 1 else path.name
        raise EditkitError(
            f"{share.of} processes were asked to collect what {of} began: it is in '{path.parent}', {stem}, with "
            f"{header['count']:,} keys in {path.name}. Start {of} to go on with it, or delete it to begin again."
        )
    return missing


def _hold(store: Store, modules: list[str], held: ExitStack, *, wait: bool) -> None:
    """Hold the modules' locks until `held` ends. Raises OutputError where the cache cannot be written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that nothing is cached: here that is an error
        if not store.lock(modules, held, progress=wait, wait=wait):
            raise OutputError(f"'{store.folder}' cannot be written. Shares need a cache: set EDITKIT_CACHE.")


def _read(store: Store, modules: dict[int, str], settings: MomentSettings) -> dict[int, SecondMoment]:
    found = store.read(modules.values())
    if absent := [module for module in modules.values() if module not in found]:
        raise EditkitError(
            f"The second moment at {absent[0]} is not in '{store.folder}', though the shares were added up. All "
            "processes need one cache: set EDITKIT_CACHE to a folder that every machine has."
        )
    warn_few(found, settings)
    return {layer: found[module] for layer, module in modules.items()}
