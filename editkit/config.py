"""From conf/*.yaml and the command line to `settings.Config`. Hydra is known here and in run.py only.

Overrides are checked before Hydra runs: a misspelt group, option or key, or a value of another type, is one
line that offers the near match.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from editkit.data.formats import check_format
from editkit.errors import ConfigError, did_you_mean
from editkit.methods import get_method
from editkit.settings import Config, DataSettings, EditSettings, ModelSettings, MomentSettings
from editkit.tasks import get_task

_HERE = Path(__file__).resolve().parent
# conf/ is inside the installed package, and beside it in a checkout.
CONF_DIR = next(p for p in (_HERE / "conf", _HERE.parent / "conf") if (p / "config.yaml").is_file())
GROUPS = ("task", "model", "edit", "data", "method", "moments")
_OPEN_GROUPS = {"model"}  # any other option is taken as the name: model=FOLDER_OR_NAME


def options(group: str) -> list[str]:
    """The options of a configuration group that ship with the package."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def to_config(composed: DictConfig) -> Config:
    """The composed configuration as dataclasses. Raises ConfigError naming the key that does not fit."""
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    method = dict(values.pop("method"))
    name = method.pop("name")
    task = values.pop("task")
    parts = {
        "task": _typed(get_task(task["name"]).settings, task, "task"),
        "model": _typed(ModelSettings, values.pop("model"), "model"),
        "edit": _typed(EditSettings, values.pop("edit"), "edit"),
        "data": _typed(DataSettings, values.pop("data"), "data"),
        "method": _typed(get_method(name).settings, method, f"method={name}: method"),
        "moments": _typed(MomentSettings, values.pop("moments"), "moments"),
    }
    check_format(parts["data"].name)
    top = _typed(_Top, values, "")
    return Config(method_name=name, **dataclasses.asdict(top), **parts)


@dataclasses.dataclass
class _Top:
    """The keys outside all groups."""

    seed: int = 0
    device: str = "auto"
    matmul: str = "highest"
    resume: bool = False


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


def prepare(overrides: list[str]) -> list[str]:
    """The overrides as Hydra shall see them, checked.

    - `model=NAME` for a NAME that is no option becomes `model.name=NAME`.
    - Another subject clears target_true, neighborhood and portability of the chosen edit, another prompt its
      paraphrases as well, unless they are given too: they belong to the fact that was replaced.
    - A trace with a data set named is an average over it.

    Raises ConfigError for whatever does not fit, before anything is loaded.
    """
    parsed = [_parse(text) for text in overrides]
    keys = {o.key_or_group for o in parsed}
    ready = [_renamed(o) for o in parsed]
    cleared = []
    if "edit.subject" in keys or "edit.prompt" in keys:
        cleared = ["target_true=''", "neighborhood=[]", "portability=[]"] + (
            ["paraphrases=[]"] if "edit.prompt" in keys else []
        )
    ready += [f"edit.{text}" for text in cleared if f"edit.{text.split('=')[0]}" not in keys]
    of_data = any(key == "data" or key.startswith("data.") for key in keys)
    if "task=trace" in overrides and of_data and "task.average" not in keys:
        ready.append("task.average=true")
    _check([_parse(text) for text in ready])
    return ready


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"'{text}' cannot be read as key=value: {_first_line(error)}. Quote a value that holds spaces, commas, "
            """braces or equal signs twice: 'edit.prompt="{} is in"'."""
        ) from error


def _renamed(override: Override) -> str:
    text = override.input_line or ""
    if override.key_or_group in _OPEN_GROUPS and not override.is_sweep_override():
        name = str(override.value())
        if name not in options(override.key_or_group):
            return f"{override.key_or_group}.name={text.split('=', 1)[1]}"
    return text


def _values(override: Override) -> list[str]:
    """The value of an override, or all of them for a sweep."""
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    return [override.get_value_element_as_str()]


def _check(overrides: list[Override]) -> None:
    """Compose with the first value of every override, and again with each other value of each sweep."""
    own = [o for o in overrides if not o.key_or_group.startswith("hydra")]
    for override in own:
        if override.key_or_group in GROUPS:
            known = options(override.key_or_group)
            for option in _values(override):
                if option not in known:
                    raise ConfigError(f"No {override.key_or_group} '{option}': {did_you_mean(option, known)}")
    first = {o.key_or_group: _values(o)[0] for o in own}
    groups = {key: value for key, value in first.items() if key in GROUPS}
    paths = set(_keys(_composed(groups)))
    for key in first:
        if key not in GROUPS and key not in paths:
            raise ConfigError(f"No key '{key}': {did_you_mean(key, [*GROUPS, *paths])}")
    to_config(_composed(first))
    for override in own:
        for value in _values(override)[1:]:
            to_config(_composed(first | {override.key_or_group: value}))


def _composed(overrides: dict[str, str]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            composed: DictConfig = compose("config", [f"{key}={value}" for key, value in overrides.items()])
            return composed
    except HydraException as error:
        raise ConfigError(_first_line(error)) from error
