"""Probes by template: prompts made from a case's facts and the wording of their relations. One file a template.

A template turns a case into probes of its own kind, which has the template's name:

    register("negation", negation)

`task.measure.probes=[negation,alias]` asks for them; the metrics of these kinds are in `editkit/metrics/probes.py`. A
fact that a template has no words for gets no probe, so each metric has its own n. Another package adds a template with
the same call, an entry point `NAME = "its.module"` in the group `editkit.probes` (see registry.py), and a metric of its
kind of row. Names are listed without importing torch.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from editkit.registry import Registry

if TYPE_CHECKING:
    from editkit.data.cases import Case, Probe

Template = Callable[["Case"], "Iterable[Probe]"]

_TEMPLATES: Registry[Template] = Registry("probe", package=__name__, group="editkit.probes")


def register(name: str, template: Template) -> Template:
    """Add a template: `task.measure.probes=[NAME]` asks its probes. Raises ConfigError for a name that is taken."""
    return _TEMPLATES.register(name, template, home=template.__module__)


def unregister(name: str) -> None:
    """Take a template out again, as a test does."""
    _TEMPLATES.unregister(name)


def names() -> list[str]:
    """The names of all templates, sorted. Imports none."""
    return _TEMPLATES.names()


def check_templates(asked: Iterable[str]) -> None:
    """Raises ConfigError for a name that is no template, with the near match."""
    for name in asked:
        _TEMPLATES.check(name)


def templated(case: "Case", asked: Iterable[str]) -> "list[Probe]":
    """The probes of `case` by the templates named in `asked`, in that order. Raises ConfigError for an unknown one."""
    return [probe for name in asked for probe in _TEMPLATES.get(name)(case)]
