"""Recipe: a stack of edits with strengths, and how each was computed; as JSON, as Python and as a command.

An edit is computed on the model with the edits that are in force then, as in a session. Its ΔW stays as it is when
others are turned off, moved or removed later. So a recipe also keeps removed steps that a kept one was computed on.
"""

import base64
import binascii
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from editkit.edits import Edit, stack
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods import get_method
from editkit.models.load import LanguageModel
from editkit.workbench import messages

VERSION = 1
MOST = 200  # edits of a state


@dataclass(frozen=True)
class Made:
    """How a step is computed. `on_top`: (digest, strength) of the edits in force, in their order."""

    fact: Fact
    method: str
    settings: dict[str, Any]  # those that are not the method's defaults
    seed: int = 0
    on_top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Step:
    """An edit, and how it was computed."""

    made: Made
    edit: Edit

    @property
    def digest(self) -> str:
        return self.edit.digest


@dataclass(frozen=True)
class Place:
    """A step on the stack: in force or not, and its factor of ΔW."""

    step: Step
    on: bool = True
    strength: float = 1.0


Stack = tuple[Place, ...]
Known = Mapping[str, Step]  # steps by digest


def in_force(places: Stack) -> list[tuple[Step, float]]:
    """The steps that count, with their strengths, in order."""
    return [(place.step, place.strength) for place in places if place.on and place.strength != 0]


def total_of(lm: LanguageModel, steps: Sequence[tuple[Step, float]]) -> Edit | None:
    """Their sum as one edit of `lm`, which is unedited; None for none."""
    return stack(lm, [step.edit for step, _ in steps], [strength for _, strength in steps]) if steps else None


def needed(places: Stack, known: Known) -> list[Step]:
    """The steps of the stack and those that they were computed on, each after the ones it needs."""
    found: dict[str, Step] = {}

    def add(step: Step) -> None:
        if step.digest not in found:
            for digest, _ in step.made.on_top:
                add(known[digest])
            found[step.digest] = step

    for place in places:
        add(place.step)
    return list(found.values())


def to_json(lm: LanguageModel, base: str, places: Stack, known: Known, total: Edit | None) -> dict[str, Any]:
    """The recipe. `base`: digest of the unedited model; `total`: the edit that the stack makes."""
    steps = needed(places, known)
    numbers = {step.digest: number for number, step in enumerate(steps)}
    return {
        "version": VERSION,
        "model": lm.name,
        "base": base,
        "steps": [
            asdict(step.made.fact)
            | {"method": step.made.method, "settings": step.made.settings, "seed": step.made.seed}
            | {"on_top": [[numbers[digest], strength] for digest, strength in step.made.on_top], "digest": step.digest}
            for step in steps
        ],
        "stack": [[numbers[place.step.digest], place.on, place.strength] for place in places],
        "total": total.digest if total is not None else None,
    }


def packed(recipe: Mapping[str, Any]) -> str:
    """The recipe as one word, for a link and a command."""
    text = json.dumps(recipe, ensure_ascii=False, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def unpacked(word: str) -> Any:
    """What `packed` packed. Raises EditkitError for a word that is none."""
    try:
        return json.loads(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)))
    except (binascii.Error, ValueError) as error:
        raise EditkitError("The link is damaged: its state cannot be read. Copy the whole link again.") from error


@dataclass(frozen=True)
class Read:
    """A recipe that was read. `on_top` and `places` name steps by their number in `steps`."""

    steps: list[tuple[Made, str]]  # with its digest, each after those it was computed on
    on_top: list[list[tuple[int, float]]]
    places: list[tuple[int, bool, float]]
    total: str | None


def read(found: Any, model: str, base: str) -> Read:
    """Check a recipe that came from outside. Raises EditkitError for one that is damaged or of another model than
    `model`, whose digest is `base`; ConfigError and FactError for what no method takes."""
    try:
        if found["version"] != VERSION:
            raise EditkitError(f"The state is of version {found['version']!r}, and this workbench reads {VERSION}.")
        if found["base"] != base:
            raise EditkitError(
                f"The state is of the model '{str(found['model'])[:80]}' with digest {str(found['base'])[:12]}; the "
                f"workbench has '{model}' with {base[:12]}. Start it with that model."
            )
        steps, on_top = [], []
        for number, row in enumerate(found["steps"]):
            method = get_method(messages.text(row, "method"))
            settings = row["settings"]
            messages.settings(method, settings)
            fact = Fact(*(messages.text(row, name) for name in ("prompt", "subject", "target_new", "target_true")))
            made = Made(fact, method.name, settings, messages.whole(row, "seed", *messages.SEEDS))
            below = [(_number(i, number), _strength(factor)) for i, factor in row["on_top"]]
            steps.append((made, messages.text(row, "digest", most=64)))
            on_top.append(below)
        places = [(_number(i, len(steps)), on is True, _strength(factor)) for i, on, factor in found["stack"]]
        total = found["total"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EditkitError("The link is damaged: its state is not complete. Copy the whole link again.") from error
    if len({number for number, _, _ in places}) < len(places) or len(steps) > MOST:
        raise EditkitError(f"The state names an edit twice, or more than {MOST}.")
    return Read(steps, on_top, places, total if isinstance(total, str) else None)


def _number(value: Any, count: int) -> int:
    """The number of one of `count` steps."""
    return messages.whole({"number": value}, "number", 0, count - 1)


def _strength(value: Any) -> float:
    return messages.number({"strength": value}, "strength", *messages.STRENGTHS)


# --- as text ------------------------------------------------------------------------------------------------------


def python(lm: LanguageModel, places: Stack, known: Known, total: Edit | None) -> str:
    """The Python that makes this very edit, and says so."""
    steps = needed(places, known)
    names = {step.digest: f"edit_{number}" for number, step in enumerate(steps, 1)}
    dtype = str(lm.dtype).removeprefix("torch.")
    lines = ["from editkit import Fact, load", "from editkit.edits import stack"]
    lines += ["from editkit.methods import get_method", ""]
    lines += [f"lm = load({lm.name!r}, device={str(lm.device)!r}, dtype={dtype!r})"]
    for step in steps:
        lines += ["", *_step_lines(step, names, known)]
    kept = in_force(places)
    if total is None:
        return "\n".join([*lines, "", "# Nothing is in force: the model is as it was loaded.", ""])
    listed, factors = ", ".join(names[step.digest] for step, _ in kept), ", ".join(f"{s!r}" for _, s in kept)
    lines += ["", f"edit = stack(lm, [{listed}], [{factors}])", f'assert edit.digest == "{total.digest}"']
    return "\n".join([*lines, 'edit.save("edit.safetensors")', ""])


def _step_lines(step: Step, names: Mapping[str, str], known: Known) -> Iterator[str]:
    made = step.made
    yield f"method = get_method({made.method!r})"
    yield f"settings = method.settings({', '.join(f'{key}={value!r}' for key, value in made.settings.items())})"
    yield f"shared = method.shared(lm, settings, None, {made.seed}, False)  # of the unedited model"
    fact = made.fact
    yield f"fact = Fact({fact.prompt!r}, {fact.subject!r}, {fact.target_new!r}, {fact.target_true!r})"
    own = [names[digest] for digest, _ in made.on_top if known[digest].made.method == made.method]
    earlier = f", earlier=[{', '.join(own)}]" if own else ""
    call = f"{names[step.digest]} = method(lm, fact, settings, seed={made.seed}{earlier}, **shared)"
    if made.on_top:
        listed = ", ".join(names[digest] for digest, _ in made.on_top)
        yield f"with stack(lm, [{listed}], [{', '.join(f'{s!r}' for _, s in made.on_top)}]).applied(lm):"
        call = f"    {call}"
    yield call


def command(lm: LanguageModel, word: str) -> str:
    """The command line that makes this very edit; `word`: the packed recipe."""
    dtype = str(lm.dtype).removeprefix("torch.")
    given = (f"model={lm.name}", f"device={lm.device}", f"dtype={dtype}", "--rebuild", word)
    words = ["python", "-m", "editkit.workbench", *given, "--into", "edit.safetensors"]
    return " ".join(map(shlex.quote, words))


def settings_given(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are not the method's defaults, so that recipes are short."""
    default = get_method(method).settings()
    return {name: value for name, value in values.items() if getattr(default, name) != value}
