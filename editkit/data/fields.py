"""The fields of a raw record, read with checks: whatever is missing, of another type, empty or unreadable is named.

Texts come without the spaces around them (a target is joined to its prompt by one space). Refused are texts that
show nothing (zero-width characters alone), that no tokenizer takes (lone surrogates), that hold control characters
(a broken export), or that no model's window holds.
"""

import re
import reprlib
import unicodedata
from collections.abc import Mapping
from typing import Any

from editkit.data.cases import NEIGHBORHOOD, SAME_SUBJECT, Probe
from editkit.errors import DataError, FactError
from editkit.facts import Fact

LONGEST = 20_000  # characters of one text: some 5,000 tokens
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")

SAME = (
    "target_new is what the source itself gives as true (the model it was made with said otherwise): the case is kept "
    "as the source's evaluation keeps it, with target_true unknown"
)


class BadField(DataError):
    """`field` of a record cannot be used; `reason` says why."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


class Raw:
    """A raw record, or an object inside one at `path`. Every reader raises BadField with the field's whole path."""

    def __init__(self, values: Any, path: str = ""):
        if not isinstance(values, Mapping):
            raise BadField(path or "(record)", f"must be an object with fields; found {shown(values)}.")
        self.values, self.path = values, path

    def __contains__(self, name: str) -> bool:
        """Whether the field is there with a value; null counts as absent, as tables fill their gaps with it."""
        return self.values.get(name) is not None

    def at(self, name: str) -> str:
        """The field's path from the record's top."""
        return f"{self.path}.{name}" if self.path else name

    def value(self, name: str) -> Any:
        if name not in self:
            raise BadField(self.at(name), "is missing.")
        return self.values[name]

    def text(self, name: str) -> str:
        return as_text(self.value(name), self.at(name))

    def template(self, name: str) -> str:
        """A text with {} once, for the subject."""
        text = as_text(self.value(name), self.at(name), template=True)
        if text.count("{}") != 1:
            raise BadField(self.at(name), f"must hold {{}} once, for the subject; found {shown(text)}.")
        return text

    def maybe_text(self, name: str) -> str:
        """The text; "" where the field is absent or empty."""
        return self.text(name) if self.values.get(name) not in (None, "") else ""

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; it may be empty, but must be there."""
        values = as_list(self.value(name), self.at(name))
        return tuple(as_text(value, f"{self.at(name)}[{i}]") for i, value in enumerate(values))

    def answers(self, name: str) -> tuple[str, ...]:
        """The answer and its other spellings, from a text, a list of texts or, where several answers are right, a list
        of such lists. Empty entries and repetitions are left out; one answer must remain."""
        value, field = self.value(name), self.at(name)
        if isinstance(value, str):
            return (as_text(value, field),)
        found: dict[str, None] = {}
        for i, entry in enumerate(as_list(value, field)):
            inner = entry if isinstance(entry, list) else [entry]
            for answer in inner:
                if answer != "":
                    found[as_text(answer, f"{field}[{i}]")] = None
        if not found:
            raise BadField(field, "holds no answer.")
        return tuple(found)

    def part(self, name: str) -> "Raw":
        return Raw(self.value(name), self.at(name))

    def parts(self, name: str) -> list["Raw"]:
        """A list of objects; it may be empty, but must be there."""
        values = as_list(self.value(name), self.at(name))
        return [Raw(value, f"{self.at(name)}[{i}]") for i, value in enumerate(values)]

    def id(self, name: str) -> str:
        """The source's own id, a number or a text; "" where it has none, and the loader numbers the record."""
        value = self.values.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return "" if value is None else as_text(value, self.at(name))


def as_text(value: Any, field: str, template: bool = False) -> str:
    """`value` as a text that a model can be asked, without spaces around it; only a template may hold {}.

    Raises BadField.
    """
    if not isinstance(value, str):
        raise BadField(field, f"must be a text; found {shown(value)}.")
    text = value.strip()
    if not text:
        raise BadField(field, "is empty.")
    if len(text) > LONGEST:
        raise BadField(field, f"has {len(text):,} characters; more than {LONGEST:,} are no prompt.")
    if bad := _SURROGATE.search(text) or _CONTROL.search(text):
        what = "half of a surrogate pair" if _SURROGATE.match(bad[0]) else "a control character"
        raise BadField(field, f"holds {what}, {bad[0]!r}, at character {bad.start()}: {shown(text)}.")
    if "{}" in text and not template:
        raise BadField(field, f"holds {{}}, the place of a subject, unfilled: {shown(text)}.")
    if not any(unicodedata.category(c)[0] in "LNPS" for c in text):
        raise BadField(field, f"shows no character: {text!a:.60}.")
    return text


def as_list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadField(field, f"must be a list; found {shown(value)}.")
    return value


def shown(value: Any) -> str:
    """A short and printable picture of any value, however long or deep."""
    picture = printable(reprlib.repr(value))
    return f"{type(value).__name__} {picture if len(picture) <= 80 else picture[:79] + '…'}"


def printable(text: str) -> str:
    """The text with what UTF-8 cannot write, escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# --- facts and probes ---------------------------------------------------------------------------------------------


def new_fact(field: str, template: str, subject: str, target_new: str, target_true: str = "") -> Fact:
    """The fact of a prompt with {} for the subject. Raises BadField."""
    if target_new == target_true:
        raise BadField("target_new", f"is {shown(target_new)}, as target_true is: there is nothing to change.")
    try:
        return Fact(template, subject, target_new, target_true)
    except FactError as error:
        raise BadField(field, str(error)) from error


def fact_of_text(field: str, text: str, subject: str, target_new: str, target_true: str = "") -> Fact:
    """The fact of a prompt that names its subject (see `located`); the subject is taken as the prompt spells it.

    Raises BadField when the prompt does not hold the subject.
    """
    place = located(text, subject)
    if place is None:
        raise BadField(field, f"does not hold the subject {shown(subject)}: {shown(text)}.")
    template = text[: place[0]] + "{}" + text[place[1] :]
    return new_fact(field, template, text[place[0] : place[1]], target_new, target_true)


def located(text: str, subject: str) -> tuple[int, int] | None:
    """Where `text` names `subject`: whole words before parts of words, the same letters before other capitals, and of
    several places the last, whose tokens have seen the others.

    >>> located("Rome is where Romeo and Rome meet", "Rome")
    (24, 28)
    >>> located("the louvre is in", "The Louvre")
    (0, 10)
    """
    last = text.rfind(subject)
    if last >= 0 and _whole(text, last, last + len(subject)):  # nearly always, and without compiling anything
        return last, last + len(subject)
    name = re.escape(subject)
    for flags in (re.NOFLAG, re.IGNORECASE):
        for pattern in (rf"(?<!\w){name}(?!\w)", name):
            if found := list(re.finditer(pattern, text, flags)):
                return found[-1].span()
    return None


def _whole(text: str, begin: int, end: int) -> bool:
    """Whether no word goes on over either end."""
    return not re.match(r"\w", text[begin - 1 : begin]) and not re.match(r"\w", text[end : end + 1])


def unlike(target_new: str, known: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """target_true from the answers that the source gives as true, and a note where target_new is one of them."""
    if target_new in known:
        return "", (SAME,)
    return known[0] if known else "", ()


def stays(fact: Fact, prompt: str, answers: tuple[str, ...], group: str = "") -> Probe:
    """A prompt whose answers must stay: of the same subject where it names it in whole words, else of a neighbor."""
    place = located(prompt, fact.subject)
    kind = SAME_SUBJECT if place and _whole(prompt, *place) else NEIGHBORHOOD
    return Probe(kind, prompt, answers[0], fact.target_new, answers[1:], group)
