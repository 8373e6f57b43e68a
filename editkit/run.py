"""The door: compose the configuration, run the task, write the run folder.

    python -m editkit.run edit=gpt2_fact
    python -m editkit.run -m method.layer=3,4,5 seed=0,1

An EditkitError is one line on stderr and exit code 1 (2 for a wrong configuration). In a sweep the other
jobs go on, the table holds those that finished, and the exit code is 1.
"""

import contextlib
import json
import os
import sys
import traceback
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from editkit import start
from editkit.config import CONF_DIR, offer_all, prepare, to_config
from editkit.errors import ConfigError, EditkitError
from editkit.files import make_folder, write_text
from editkit.runs import collect, names
from editkit.tasks import get_task

SHELLS = ("bash", "zsh", "fish")  # that Hydra writes completions for; zsh reads bash's
_HYDRA_FLAGS_WITH_VALUE = {"--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd", "--package", "-p"}
_HYDRA_FLAGS_WITH_VALUE |= {"--cfg", "-c", "--info", "-i", "--experimental-rerun"}


def main() -> None:
    """Entry point of `python -m editkit.run` and of the command `editkit`."""
    start.pause_collector()
    try:
        flags, overrides = _split(sys.argv[1:])
        if {"-sc", "--shell-completion"} & {*flags}:
            _complete(overrides)
            return
        sweep = "-m" in flags or "--multirun" in flags
        helping = any(f in flags for f in ("--help", "-h", "--hydra-help", "--version"))
        planning = any(text.lower() == "plan=true" for text in overrides)  # then there are no results
        if not helping:
            overrides = prepare(overrides, _config_dirs(flags))
        folder = _folder(overrides, sweep)
        if not helping and not any(f in flags for f in ("--cfg", "-c", "--info", "-i")):
            make_folder(folder)
        sys.argv[1:] = [*flags, *overrides]
        os.environ.setdefault("HYDRA_FULL_ERROR", "1" if _wants_traceback() else "0")
        _hydra_main()
    except EditkitError as error:
        _fail(error)
    except KeyboardInterrupt:
        print("interrupted: weights are restored; finished results are kept", file=sys.stderr)
        sys.exit(130)
    finally:
        start.resume_collector()
    if sweep and not helping and not planning:
        _finish_sweep(folder)


def _composed_run(composed: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if in_sweep:
        print(f"\n=== job {HydraConfig.get().job.num}: {HydraConfig.get().job.override_dirname}", flush=True)
    try:
        _run(composed, folder)
    except EditkitError as error:
        if not in_sweep:
            raise SystemExit(_report(error)) from None
        write_text(folder / names.FAILED, f"{error}\n")
        _report(error)


_hydra_main = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(_composed_run)


def _run(composed: DictConfig, folder: Path) -> None:
    config = to_config(composed)  # torch is not imported before the configuration has been checked
    write_text(folder / names.CONFIG, OmegaConf.to_yaml(composed, resolve=True))
    run = get_task(config.task.name).load()
    start.import_libraries()
    start.resume_collector()
    from editkit import plan  # which imports torch

    if config.plan:
        found = plan.plan_of(config)
        print(found, flush=True)
        write_text(folder / names.PLAN, json.dumps(found.to_json(), indent=2) + "\n")
        found.require_fit()
    else:
        plan.require_fit(config)
        run(config, folder)
        if config.reproduces is not None:
            from editkit.report import published
            from editkit.runs.read import Run

            print("\n".join(["", *published.lines(Run.at(folder))]), flush=True)


def _complete(asked: list[str]) -> None:
    """Completion in a shell: `install=bash` prints what the shell is to read, `query=bash` the words that fit its line.

    The line is in $COMP_LINE. While it is being typed it may be no configuration at all: then there are no words, and
    no error, which would be printed into it. Raises ConfigError for another command or shell.
    """
    command, _, shell = "".join(asked).partition("=")
    if command not in ("install", "uninstall", "query") or shell not in SHELLS:
        raise ConfigError(
            f"-sc takes install=SHELL or uninstall=SHELL, where SHELL is {', '.join(SHELLS)}; found "
            f"'{' '.join(asked)}'. In ~/.bashrc: eval \"$(editkit -sc install=bash)\"."
        )
    if command != "query":
        _hydra_main()
        return
    offer_all(os.environ.get("COMP_LINE", "").split())
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.suppress(SystemExit):
        _hydra_main()


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags, with their values, and the overrides."""
    flags, overrides = [], []
    takes_value = False
    for argument in arguments:
        if takes_value or argument.startswith("-"):
            flags.append(argument)
            takes_value = not takes_value and argument in _HYDRA_FLAGS_WITH_VALUE
        else:
            overrides.append(argument)
    return flags, overrides


def _config_dirs(flags: list[str]) -> list[Path]:
    """The folders that --config-dir names."""
    named = [flag.split("=", 1)[1] for flag in flags if flag.startswith(("--config-dir=", "-cd="))]
    return [Path(each) for each in (*named, *(b for a, b in pairwise(flags) if a in ("--config-dir", "-cd")))]


def _folder(overrides: list[str], sweep: bool) -> Path:
    """The run or sweep folder: the user's, else a new one, put into `overrides`. Shown to be writable."""
    key, parent = ("hydra.sweep.dir", "sweeps") if sweep else ("hydra.run.dir", "runs")
    for text in overrides:
        if text.startswith(f"{key}="):
            return Path(text.split("=", 1)[1])
    # The process number keeps two runs of one second apart.
    folder = Path(parent) / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"
    overrides.append(f"{key}={folder}")
    return folder


def _finish_sweep(folder: Path) -> None:
    """One table and one page over all finished jobs; exit code 1 when a job failed."""
    from editkit import report

    failed = sorted(folder.glob(f"*/{names.FAILED}"))
    try:
        table, paired = collect.collect(folder), collect.paired(folder)
        write_text(folder / names.TABLE, table.to_csv(index=False))
        if len(paired):
            write_text(folder / names.PAIRED, paired.to_csv(index=False))
        page = report.write(folder)
    except EditkitError as error:
        _fail(error)
    brief = table.loc[:, table.attrs["brief"]]
    print(f"\n{brief.to_string(index=False, float_format='{:.3f}'.format, max_colwidth=30)}\n")
    if table.attrs["protocols"]:
        print(f"{table.attrs['protocols']}\n")
    if len(paired):
        first = paired.loc[paired["first"] == paired["first"].iloc[0]].drop(columns=["first"])
        print(
            f"the first run ({first['first_method'].iloc[0]}) minus each other, on the same cases; P that it is better"
        )
        shown = first.drop(columns=["first_method"])
        print(f"{shown.to_string(index=False, float_format='{:.3f}'.format, max_colwidth=30)}\n")
        print(folder / names.PAIRED)
    for path in failed:
        print(f"job {path.parent.name} failed: {path.read_text(encoding='utf-8').strip()}", file=sys.stderr)
    print(page)
    print(folder / names.TABLE)
    if failed:
        sys.exit(1)


def _wants_traceback() -> bool:
    return bool(os.environ.get("EDITKIT_TRACEBACK"))


def _report(error: EditkitError) -> int:
    """Print the error; the exit code."""
    if _wants_traceback():
        traceback.print_exception(error)
    print(f"editkit: {error}", file=sys.stderr)
    return error.exit_code


def _fail(error: EditkitError) -> NoReturn:
    sys.exit(_report(error))


if __name__ == "__main__":
    main()
