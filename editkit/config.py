"""From conf/*.yaml and the command line to `settings.Config`. Hydra is known here and in run.py only.

Overrides are checked before Hydra runs: a misspelt group, option or key, or a value of another type, is one
line that offers the near match. Torch is not imported for it, unless a value below `method.` is checked: the settings
of a method are in its file.

The options of a group are YAML files: ours, and those of `--config-dir`. A method, data format or task that is
registered without one has an option too, composed from the defaults of its settings.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from editkit import judges, methods, tasks
from editkit.data import formats, templates
from editkit.errors import ConfigError, did_you_mean
from editkit.settings import Config, DataSettings, EditSettings, ModelSettings, MomentSettings, Reproduction

_HERE = Path(__file__).resolve().parent
# conf/ is inside the installed package, and beside it in a checkout.
CONF_DIR = next(p for p in (_HERE / "conf", _HERE.parent / "conf") if (p / "config.yaml").is_file())
GROUPS = ("task", "model", "edit", "data", "method", "moments")
REPRODUCE = "reproduce"  # a group of whole runs: its options set those of the others
_OPEN_GROUPS = {"model"}  # any other option is taken as the name: model=FOLDER_OR_NAME


# Of the groups whose options can be registered in code: the names that there are, and the default settings of one.
_REGISTERED: dict[str, tuple[Callable[[], list[str]], Callable[[str], Any]]] = {
    "method": (methods.names, lambda name: methods.get_method(name).settings()),
    "data": (formats.names, DataSettings),
    "task": (tasks.names, lambda name: tasks.get_task(name).settings()),
}


def options(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """The options of a configuration group that are YAML files, of the package and of `folders` (--config-dir)."""
    return sorted({path.stem for folder in (CONF_DIR, *folders) for path in (folder / group).glob("*.yaml")})


def to_config(composed: DictConfig, *, with_method: bool = True) -> Config:
    """The composed configuration as dataclasses.

    `with_method`: check the method's settings too, which imports its file; else they are None.
    Raises ConfigError naming the key that does not fit.
    """
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    method, task = dict(values.pop("method")), values.pop("task")
    name = str(method.pop("name", ""))
    parts: dict[str, Any] = {
        "task": _typed(tasks.get_task(task["name"]).settings, task, "task"),
        "model": _typed(ModelSettings, values.pop("model"), "model"),
        "edit": _typed(EditSettings, values.pop("edit"), "edit"),
        "data": _typed(DataSettings, values.pop("data"), "data"),
        "moments": _typed(MomentSettings, values.pop("moments"), "moments"),
    }
    formats.check_format(parts["data"].name)
    judges.check_judge(getattr(parts["task"], "judge", None))
    templates.check_templates(getattr(getattr(parts["task"], "measure", None), "probes", ()))
    methods.check_method(name)
    top = dataclasses.asdict(_typed(_Top, values, ""))
    top["reproduces"] = _reproduction(top["reproduces"], composed)
    settings = _typed(methods.get_method(name).settings, method, f"method={name}: method") if with_method else None
    return Config(method_name=name, method=settings, **parts, **top)


@dataclasses.dataclass
class _Top:
    """The keys outside all groups."""

    seed: int = 0
    device: str = "auto"
    matmul: str = "highest"
    resume: bool = False
    plan: bool = False
    reproduces: str | None = None


def _reproduction(name: str | None, composed: DictConfig) -> Reproduction | None:
    """What the run is made after, and in what it differs from that. Raises ConfigError for an unknown name."""
    if name is None:
        return None
    if name not in (known := options(REPRODUCE)):
        raise ConfigError(f"No table '{name}' for reproduces: {did_you_mean(name, known)}")
    preset = OmegaConf.load(CONF_DIR / REPRODUCE / f"{name}.yaml")
    assert isinstance(preset, DictConfig)
    wanted: dict[str, Any] = {}
    for each in preset.defaults:
        ((group, option),) = each.items()  # "override /task": benchmark
        group = group.rpartition("/")[2]
        values = OmegaConf.load(CONF_DIR / group / f"{option}.yaml")
        assert isinstance(values, DictConfig)
        same = OmegaConf.select(composed, f"{group}.name") == values.name
        wanted |= {f"{group}.{key}": OmegaConf.select(values, key) for key in (_keys(values) if same else ("name",))}
    wanted |= {key: OmegaConf.select(preset, key) for key in _keys(preset)}
    differs = []
    for key, value in wanted.items():
        found = OmegaConf.select(composed, key)
        if not (key.startswith(_NO_SETTING) or isinstance(value, DictConfig) or found == value):
            differs.append(f"{key}: {found}, there {value}")
    return Reproduction(name, tuple(differs))


# Keys that say nothing about what is measured, but where things are and what is kept.
_NO_SETTING = ("defaults", "reproduces", "data.path", "data.revision", "data.on_bad_record", "task.keep", "task.save")


def _typed(schema: type, values: Any, where: str) -> Any:
    """`values` as the dataclass `schema`, every key and type checked."""
    node = OmegaConf.structured(schema)
    _unfreeze(node)
    try:
        return OmegaConf.to_object(OmegaConf.merge(node, values))
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key or "")
        path = f"{where}.{key}" if where else key
        if "not in" in str(error):
            raise ConfigError(f"No key '{path}': {did_you_mean(key, _keys(node))}") from error
        raise ConfigError(f"{path}: {_first_line(error)}") from error


def _unfreeze(node: DictConfig) -> None:
    """OmegaConf makes a frozen dataclass read-only, nested ones too; merging needs them open."""
    node._set_flag("readonly", False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _unfreeze(child)


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys."""
    for key in map(str, node):
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _keys(child, f"{prefix}{key}.")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


# --- the command line -----------------------------------------------------------------------------------------


def prepare(overrides: list[str], folders: Sequence[Path] = ()) -> list[str]:
    """The overrides as Hydra shall see them, checked. `folders`: those of `--config-dir`, searched too.

    - `model=NAME` for a NAME that is no option becomes `model.name=NAME`; `+reproduce=NAME` becomes `reproduce=NAME`.
    - Another subject clears target_true, neighborhood and portability of the chosen edit, another prompt its
      paraphrases as well, unless they are given too: they belong to the fact that was replaced.
    - A trace with a data set named is an average over it.

    Raises ConfigError for whatever does not fit, before anything is loaded.
    """
    overrides = [text.removeprefix("+") if text.startswith(f"+{REPRODUCE}=") else text for text in overrides]
    parsed = [_parse(text) for text in overrides]
    keys = {o.key_or_group for o in parsed}
    ready = [_renamed(o, folders) for o in parsed]
    cleared = []
    if "edit.subject" in keys or "edit.prompt" in keys:
        cleared = ["target_true=''", "neighborhood=[]", "portability=[]"] + (
            ["paraphrases=[]"] if "edit.prompt" in keys else []
        )
    ready += [f"edit.{text}" for text in cleared if f"edit.{text.split('=')[0]}" not in keys]
    of_data = any(key == "data" or key.startswith("data.") for key in keys)
    if "task=trace" in overrides and of_data and "task.average" not in keys:
        ready.append("task.average=true")
    _check([_parse(text) for text in ready], folders)
    return ready


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"'{text}' cannot be read as key=value: {_first_line(error)}. Quote a value that holds spaces, commas, "
            """braces or equal signs twice: 'edit.prompt="{} is in"'."""
        ) from error


def _renamed(override: Override, folders: Sequence[Path]) -> str:
    text = override.input_line or ""
    if override.key_or_group in _OPEN_GROUPS and not override.is_sweep_override():
        name = str(override.value())
        if name not in options(override.key_or_group, folders):
            return f"{override.key_or_group}.name={text.split('=', 1)[1]}"
    return text


def _values(override: Override) -> list[str]:
    """The value of an override, or all of them for a sweep."""
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    return [override.get_value_element_as_str()]


def _check(overrides: list[Override], folders: Sequence[Path]) -> None:
    """Compose with the first value of every override, and again with each other value of each sweep."""
    # 1) Options: each is a YAML file, or offered to Hydra from code.
    own = [o for o in overrides if not o.key_or_group.startswith("hydra")]
    for override in own:
        if override.key_or_group in (*GROUPS, REPRODUCE):
            for option in _values(override):
                _offer(override.key_or_group, option, folders)
    # 2) Keys.
    first = {o.key_or_group: _values(o)[0] for o in own}
    groups = {key: value for key, value in first.items() if key in (*GROUPS, REPRODUCE)}
    of_groups = _composed(groups, folders)
    paths = set(_keys(of_groups))
    for key in first:
        if key not in groups and key not in paths:
            raise ConfigError(f"No key '{key}': {did_you_mean(key, [*GROUPS, REPRODUCE, *paths])}")
    # 3) Values. Those of a method that are our own defaults are right (a test sees to it).
    values = [first]
    values += [first | {override.key_or_group: value} for override in own for value in _values(override)[1:]]
    for each in values:
        ours = each.get("method", "") in ("", *options("method")) and not any(key.startswith("method.") for key in each)
        to_config(of_groups if each == groups else _composed(each, folders), with_method=not ours)


def _offer(group: str, option: str, folders: Sequence[Path]) -> None:
    """Make sure that Hydra finds the option, registered in code where no YAML file has it. Raises ConfigError."""
    known = options(group, folders)
    if option in known:
        return
    names, defaults = _REGISTERED.get(group, (list, None))
    if defaults is None or option not in names():
        raise ConfigError(f"No {group} '{option}': {did_you_mean(option, {*known, *names()})}")
    values = OmegaConf.to_container(OmegaConf.structured(defaults(option)))
    assert isinstance(values, dict)
    ConfigStore.instance().store(name=option, group=group, node={"name": option, **values}, provider="editkit")


def offer_all(words: Sequence[str]) -> None:
    """For the completion of a command line: let Hydra find every option that is registered in code.

    `words`: what the line holds so far. An option that it chooses is offered with its keys, which imports its module;
    of the others only the name is known. What cannot be imported or parsed is left out.
    """
    chosen = {tuple(word.split("=", 1)) for word in words if "=" in word}
    for group, (names, _) in _REGISTERED.items():
        for option in {*names()} - {*options(group)}:
            with contextlib.suppress(ConfigError):
                if (group, option) in chosen:
                    _offer(group, option, ())
                    continue
            ConfigStore.instance().store(name=option, group=group, node={"name": option}, provider="editkit")


def _composed(overrides: dict[str, str], folders: Sequence[Path] = ()) -> DictConfig:
    GlobalHydra.instance().clear()
    asked = [f"{key}={value}" for key, value in overrides.items()]
    if folders:
        asked.append("hydra.searchpath=[" + ",".join(f"'file://{folder.resolve()}'" for folder in folders) + "]")
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            composed: DictConfig = compose("config", asked)
            return composed
    except HydraException as error:
        raise ConfigError(_first_line(error)) from error
