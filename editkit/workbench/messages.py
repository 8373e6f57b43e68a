"""What a page may ask for. Every field is checked here, so a bad message is one clear sentence on the page."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from editkit.errors import ConfigError, EditkitError, did_you_mean
from editkit.facts import Fact
from editkit.methods import Method
from editkit.settings import LOOKUP_TOKENS, MethodSettings

Message = Mapping[str, Any]
NO_ANSWER = "…"  # in place of a new answer that is not given yet
LONGEST = 2000  # characters of a text
STRENGTHS = (-4.0, 4.0)  # factors of ΔW
SEEDS = (0, 2**31)
HIDDEN = ("transform", "simie")  # of a whole run or session, not of one edit
PLAIN = (int, float, str, bool)


def text(message: Message, name: str, *, most: int = LONGEST) -> str:
    """The text of a field; "" where it is missing."""
    value = message.get(name, "")
    if not isinstance(value, str):
        raise EditkitError(f"'{name}' is no text.")
    if len(value) > most:
        raise EditkitError(f"'{name}' has {len(value):,} characters; {most:,} are the most. Shorten it.")
    return value


def number(message: Message, name: str, low: float, high: float) -> float:
    """A number of a field, from `low` to `high`."""
    value = message.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise EditkitError(f"'{name}' is no number.")
    if not low <= value <= high:
        raise EditkitError(f"'{name}' is {value:g}; it must be from {low:g} to {high:g}.")
    return float(value)


def whole(message: Message, name: str, low: int, high: int) -> int:
    """A whole number of a field, from `low` to `high`."""
    value = number(message, name, low, high)
    if value != int(value):
        raise EditkitError(f"'{name}' is {value:g}; it must be a whole number.")
    return int(value)


def fact(message: Message, *, asked_only: bool = False) -> Fact:
    """The fact of a message: `prompt` with the subject in it, `subject`, `new`, `true`.

    `asked_only`: the new answer may be missing, since the fact is only asked or traced. Raises FactError.
    """
    prompt, subject, new, true = (text(message, name).strip() for name in ("prompt", "subject", "new", "true"))
    new = new or (NO_ANSWER if asked_only else "")
    if not prompt or not subject:
        raise EditkitError("Write a prompt, and name the subject as it stands in it.")
    if "{}" in prompt:
        return Fact(prompt, subject, new, true)
    return Fact.in_text(prompt, subject, new, true)


def watched(message: Message) -> list[tuple[str, str]]:
    """(prompt, answer) of each line "prompt → answer" of the field `watch`; the answer may be missing."""
    lines = [line.strip() for line in text(message, "watch").splitlines() if line.strip()]
    if len(lines) > 20:
        raise EditkitError(f"{len(lines)} prompts are watched; 20 are the most.")
    split = (line.replace("->", "→").partition("→") for line in lines)
    return [(prompt.strip(), answer.strip()) for prompt, _, answer in split if prompt.strip()]


def settings(method: Method, values: Any) -> MethodSettings:
    """The method's settings from JSON. Raises ConfigError for an unknown name or a value of another type."""
    if not isinstance(values, dict):
        raise EditkitError("'settings' are no names with values.")
    known = {row["name"]: row for row in fields(method)}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"No setting '{name}' of method {method.name}: {did_you_mean(str(name), known)}")
        if not _fits(value, known[name]["kind"], known[name]["optional"]):
            raise ConfigError(f"The setting '{name}' is {value!r}; it must be {NAMES[known[name]['kind']]}.")
    return method.settings(**values)


NAMES = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "ints": "blocks"}


def fields(method: Method) -> list[dict[str, Any]]:
    """The settings of a method that a page can show: name, kind, whether it may be null, default and choices."""
    hints = typing.get_type_hints(method.settings)
    found = []
    for field in dataclasses.fields(method.settings):
        kind, optional = _kind(hints[field.name])
        if kind is None or field.name in HIDDEN:
            continue
        default = field.default if field.default is not dataclasses.MISSING else None
        choices = list(LOOKUP_TOKENS) if field.name == "fact_token" else []
        row = {"name": field.name, "kind": kind, "optional": optional, "default": default, "choices": choices}
        found.append(row)
    return found


def _kind(hint: Any) -> tuple[str | None, bool]:
    """(int, float, str, bool, ints or None for anything else, whether it may be null)."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional, plain = types.NoneType in parts, [part for part in parts if part is not types.NoneType]
    if len(plain) != 1:
        return None, optional
    if plain[0] in PLAIN:
        return plain[0].__name__, optional
    return ("ints" if plain[0] in (list[int], tuple[int, ...]) else None), optional


def _fits(value: Any, kind: str, optional: bool) -> bool:
    if value is None:
        return optional
    if kind == "ints":
        return isinstance(value, list) and all(_fits(each, "int", False) for each in value)
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str) and len(value) <= LONGEST
    return isinstance(value, int) or (kind == "float" and isinstance(value, float) and math.isfinite(value))
