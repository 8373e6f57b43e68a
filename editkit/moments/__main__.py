"""Second moments on the command line.

    python -m editkit.moments collect --model atlas --layers 3,4,5 --source text.txt --tokens 100000
    torchrun --nproc-per-node 8 -m editkit.moments collect …     # shared between processes, each on its own device
    python -m editkit.moments collect … --shard 0/8              # one share of eight, as in an array of jobs
    python -m editkit.moments info                        # what the cache holds, killed collections among it
    python -m editkit.moments info FILE.safetensors       # count, condition, effective rank
    python -m editkit.moments verify FILE.safetensors --model atlas
    python -m editkit.moments export FILE.safetensors OUT.npz
    python -m editkit.moments import FILE.npz --model gpt2-xl --layer 17     # then moments.source=imported:reference

The cache is $EDITKIT_CACHE, else ~/.cache/editkit. Errors are one line and exit code 1, or 2 for a wrong command.
"""

import argparse
import signal
import sys
from pathlib import Path

from editkit.commands import Commands, load_model, model_options
from editkit.errors import ConfigError, EditkitError
from editkit.models.architecture import experts_in
from editkit.models.experts import down_of
from editkit.moments.amount import key_shape, resolved
from editkit.moments.cache import IMPORTED, cache_folder, second_moments, stored_at
from editkit.moments.collect import Share
from editkit.moments.group import TIMEOUT, Group, launched, local_rank
from editkit.moments.moment import ENOUGH, MOMENT_FILE, PARTIAL_FILE, SHARD_FILE, SecondMoment
from editkit.moments.reference import SAMPLE_SIZE, from_npz, to_npz
from editkit.moments.shards import collect_share, collect_together
from editkit.nethook import get_module
from editkit.settings import FEWEST_KEYS, KEYS_PER_DIMENSION, MomentSettings
from editkit.tensorfiles import read_header


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    return _commands().run(arguments)


def info(options: argparse.Namespace) -> int:
    """Count, condition and effective rank of one file, or a line for each file in a folder."""
    path: Path = options.path or cache_folder()
    if path.is_dir() or options.path is None:
        return _info_folder(path)
    moment = _sound(path)
    made = moment.provenance
    few = ""
    if moment.vectors_per_dimension < KEYS_PER_DIMENSION:
        needed = "" if moment.vectors_per_dimension >= ENOUGH else f"{ENOUGH} are needed, and "
        few = f"; {needed}{KEYS_PER_DIMENSION} are advised: {KEYS_PER_DIMENSION * moment.d_ff:,} keys or more"
    effective = "unknown" if moment.effective_count is None else f"{moment.effective_count:,.0f} keys carry C"
    print(f"module           {moment.module}, d_ff {moment.d_ff}")
    if moment.routed:
        print(f"experts          {len(moment.routed)}, with {min(moment.routed):,} to {max(moment.routed):,} keys each")
    print(f"model            {made.get('model', '?')}, digest {made.get('model_digest', '?')[:16]}")
    print(f"source           {moment.source}")
    print(f"keys             {moment.count:,}, {moment.vectors_per_dimension:.3g} per dimension{few}")
    print(f"effective count  {effective}")
    print(f"effective rank   {moment.effective_rank:.1f} of {len(moment.eigenvalues)}")
    print(f"condition        {moment.condition:.3g} without a ridge")
    print(f"digest           {moment.digest}")
    return 0


def _info_folder(folder: Path) -> int:
    kinds = {".safetensors": MOMENT_FILE, ".partial": PARTIAL_FILE, ".shard": SHARD_FILE}
    shown = 0
    for path in sorted(path for suffix in kinds for path in folder.rglob(f"*{suffix}")):
        kind = kinds[path.suffix]
        try:
            header = read_header(path, kind)
        except EditkitError:
            continue  # a cache holds other things too
        shown += 1
        where = path.relative_to(folder)
        if kind is MOMENT_FILE:
            made = header["provenance"].get("model", "?")
            each = header["count"] / header["d_ff"]
            what = (
                f"{made} {header['module']}: {header['count']:,} keys ({each:.3g} per dimension) of {header['source']}"
            )
        else:
            settings = header["settings"]
            goal, how = settings["tokens"], "unfinished"
            if kind is SHARD_FILE:
                rank, of = header["share"]
                goal, how = -(-goal // of), f"share {rank}/{of} {'finished' if header['finished'] else how}"
            what = (
                f"{header['model']}, {len(header['modules'])} modules: {how}, {header['count']:,} of {goal:,} keys of "
                f"{settings['source']}"
            )
        print(f"{what}\n    {where}, {path.stat().st_size / 1e6:.1f} MB")
    print(f"{shown} in {folder}" if shown else f"no second moments in {folder}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Recompute the digest; check count, finiteness, symmetry and positive semi-definiteness, and the model."""
    moment = _sound(options.file)
    against = ""
    if options.model is not None:
        lm = load_model(options)
        collected, found = moment.provenance.get("model_digest", ""), lm.digest
        if collected != found:
            raise EditkitError(
                f"'{options.file}' belongs to a model with digest {collected[:16] or '?'}; {lm.name} in "
                f"{str(lm.dtype).removeprefix('torch.')} has {found[:16]}. Collect its own, or give its --dtype."
            )
        against = f", collected on this {lm.name}"
    print(f"sound: {moment.count:,} keys, finite, symmetric, positive semi-definite{against}\ndigest {moment.digest}")
    return 0


def _sound(path: Path) -> SecondMoment:
    """The moment in the file. Raises EditkitError naming all that is wrong with it."""
    moment = SecondMoment.load(path)
    if faults := moment.faults():
        raise EditkitError(f"'{path}' holds no second moment: {'; '.join(faults)}. Delete it and collect again.")
    return moment


def collect(options: argparse.Namespace) -> int:
    """Collect the layers' second moments in one pass, into the cache. Under torchrun, each process a share of it."""
    settings = MomentSettings(source=options.source, tokens=options.tokens, block=options.block)
    group = Group(timeout=options.timeout) if launched() else None
    if group is not None:
        if options.shard is not None:
            raise ConfigError("--shard is for processes that know nothing of each other: leave it out under torchrun.")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun's, when another process has ended
        options.device = _own_device(options.device)
    lm = load_model(options)
    settings = resolved(lm, settings)
    layers = range(lm.layers) if options.layers is None else options.layers
    if group is not None:
        found = collect_together(lm, layers, settings, group=group, seed=options.seed)
        group.leave()
        if group.rank:
            return 0
    elif options.shard is not None:
        found = collect_share(lm, layers, settings, share=options.shard, seed=options.seed)
        if not found:
            print(f"share {options.shard} is finished; the last share to finish adds all up")
    else:
        found = second_moments(lm, layers, settings, seed=options.seed)
    for layer, moment in found.items():
        print(f"layer {layer}: {moment.count:,} keys, {moment.vectors_per_dimension:.3g} per dimension")
        print(f"    {stored_at(moment, settings, options.seed, cache_folder())}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write an .npz that the ROME authors' code reads."""
    moment = SecondMoment.load(options.file)
    print(to_npz(moment, options.out, options.sample_size))
    return 0


def import_(options: argparse.Namespace) -> int:
    """Put a second moment from an .npz of the ROME authors' code into the cache."""
    lm = load_model(options)
    module = down_of(lm, lm.check_layer(options.layer))
    source = IMPORTED + options.name
    made = {"model": lm.name, "model_digest": lm.digest, "settings": {"source": source}, "file": options.file.name}
    moment = from_npz(options.file, module, source, made)
    if experts_in(get_module(lm.model, module)) is not None:
        raise EditkitError(
            f"{module} of {lm.name} is a mixture of experts, and a file of the reference holds one matrix for one "
            "down-projection. Collect its second moments with `python -m editkit.moments collect`."
        )
    _, d_ff = key_shape(lm, module)
    if moment.d_ff != d_ff:
        raise EditkitError(
            f"'{options.file}' is of {moment.d_ff} dimensions, and {module} of {lm.name} takes keys of {d_ff}: it "
            "belongs to another model or module."
        )
    print(f"{moment.save(stored_at(moment, MomentSettings(source=source), 0, cache_folder()))}")
    print(f"use it with moments.source={source}")
    return 0


def _own_device(device: str) -> str:
    """The device of this process among those of its machine: CUDA device i for the i-th, where there is CUDA."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    if local_rank() >= torch.cuda.device_count():
        raise EditkitError(
            f"Process {local_rank()} of this machine has no CUDA device of its own: there are "
            f"{torch.cuda.device_count()}. Start as many processes as devices, or give --device cpu or cuda:N."
        )
    return f"cuda:{local_rank()}"


def _share(text: str) -> Share:
    try:
        rank, of = map(int, text.split("/"))
        return Share(rank, of)
    except (ValueError, ConfigError):
        raise argparse.ArgumentTypeError(f"'{text}': give i/n with 0 ≤ i < n, as in 0/8") from None


def _layers(text: str) -> list[int] | None:
    """Layer numbers; None for all."""
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': give numbers, as in 3,4,5, or all") from None


def _name(text: str) -> str:
    if not text or text.startswith(IMPORTED):
        raise argparse.ArgumentTypeError(f"'{text}': give a word, without {IMPORTED}")
    return text


def _commands() -> Commands:
    interrupted = "interrupted: what was collected is kept; the same command goes on from there"
    commands = Commands("python -m editkit.moments", __doc__, interrupted)
    add = commands.add
    defaults = MomentSettings()
    one = add("info", info)
    one.add_argument("path", nargs="?", type=Path, help="a file or a folder; default: the cache")

    one = add("verify", verify)
    one.add_argument("file", type=Path, metavar="FILE.safetensors")
    model_options(one, "also check that it was collected on this very model", required=False)

    one = add("collect", collect)
    model_options(one, "atlas, a local folder, or a Hub name")
    one.add_argument("--layers", type=_layers, default=None, metavar="N,N|all", help="blocks from 0; default: all")
    one.add_argument(
        "--source",
        default=defaults.source,
        metavar="TEXT",
        help="atlas, a text file, a folder saved by `datasets`, or hub:NAME[:CONFIG[:SPLIT]]; default: atlas",
    )
    one.add_argument(
        "--tokens",
        type=int,
        default=defaults.tokens,
        help=f"keys; default: {KEYS_PER_DIMENSION} a dimension of d_ff, and {FEWEST_KEYS:,} at least",
    )
    one.add_argument("--block", type=int, default=defaults.block, help=f"tokens a block; default: {defaults.block}")
    one.add_argument("--seed", type=int, default=0, help="of the atlas text's order; default: 0")
    one.add_argument("--shard", type=_share, metavar="i/n", help="collect the i-th of n shares alone, i from 0")
    one.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="MINUTES",
        help=f"under torchrun: to wait for another process's next batch; default: {TIMEOUT:g}",
    )

    one = add("export", export)
    one.add_argument("file", type=Path, metavar="FILE.safetensors")
    one.add_argument("out", type=Path, metavar="OUT.npz")
    one.add_argument(
        "--sample-size",
        type=int,
        default=SAMPLE_SIZE,
        help=f"the reader's mom2_n_samples: it takes no file with another number; default: {SAMPLE_SIZE}",
    )

    one = add("import", import_)
    one.add_argument("file", type=Path, metavar="FILE.npz")
    model_options(one, "the model it was collected on")
    one.add_argument("--layer", type=int, required=True, help="the block whose down-projection it belongs to")
    one.add_argument(
        "--name",
        type=_name,
        default="reference",
        help=f"moments.source={IMPORTED}NAME then stands for it, with any seed; default: reference",
    )
    return commands


if __name__ == "__main__":
    sys.exit(main())
