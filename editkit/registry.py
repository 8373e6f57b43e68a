"""Registry: entries by name, of our own and of other packages. No torch, and nothing is imported to list the names.

A name belongs to a module: the file NAME.py of our package, or the module that another package names in an entry
point NAME of the registry's group, as in its pyproject.toml

    [project.entry-points."editkit.methods"]
    nudge = "my_package.nudge"

The module is imported when its entry is first asked for, and registers the entry. Code that runs before may register
without either.
"""

import importlib
import pkgutil
import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from editkit.errors import ConfigError, did_you_mean

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by name.

    - `noun`: what an entry is called in messages, as "method".
    - `package`: our own package whose modules register one entry each; "" where they are registered otherwise.
    - `group`: the entry point group of other packages.
    """

    def __init__(self, noun: str, *, package: str = "", group: str) -> None:
        self.noun, self.package, self.group = noun, package, group
        self._entries: dict[str, Entry] = {}
        self._homes: dict[str, str] = {}

    def register(self, name: str, entry: Entry, home: str = "") -> Entry:
        """Add an entry. `home`: the module that registers it, which may register it again, as in a notebook.

        Raises ConfigError for a name that is taken.
        """
        owner = self._homes.get(name, f"{self.package}.{name}" if name in self._own() else home)
        same = home == owner and (home != "" or self._entries.get(name, entry) == entry)
        if not same:
            by = f" by {owner}" if owner else ""
            raise ConfigError(f"A {self.noun} '{name}' is registered already{by}. Give the new one another name.")
        self._entries[name], self._homes[name] = entry, home
        return entry

    def unregister(self, name: str) -> None:
        """Take an entry out again, as a test does."""
        self._entries.pop(name, None)
        self._homes.pop(name, None)

    def names(self) -> list[str]:
        """All names, sorted; nothing is imported but the package that holds our own modules."""
        return sorted({*self._entries, *self._own(), *self._points()})

    def check(self, name: str) -> None:
        """Raise ConfigError, with the near match, for a name that is not there. Imports nothing."""
        if name in self._entries or name in self._own():
            return  # without a look at the entry points of everything that is installed
        if name not in (known := self.names()):
            raise ConfigError(f"No {self.noun} '{name}': {did_you_mean(name, known)}")

    def get(self, name: str) -> Entry:
        """The entry; its module is imported if it was not yet.

        Raises ConfigError for an unknown name, with the near match, and for a module of another package that cannot be
        imported or registers no such entry.
        """
        if name not in self._entries:
            self.check(name)
            if name in self._own():
                importlib.import_module(f"{self.package}.{name}")
            else:
                self._load(self._points()[name])
        return self._entries[name]

    def all(self) -> dict[str, Entry]:
        """Every entry by name. An entry point that cannot be imported is named in a warning and left out."""
        found = {}
        for name in self.names():
            try:
                found[name] = self.get(name)
            except ConfigError as error:
                warnings.warn(str(error), stacklevel=2)
        return found

    def _own(self) -> list[str]:
        """The names of our own modules, by their files."""
        if not self.package:
            return []
        places = importlib.import_module(self.package).__path__
        return [module.name for module in pkgutil.iter_modules(places) if not module.ispkg]

    def _points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _load(self, point: EntryPoint) -> None:
        where = f"entry point '{point.name} = {point.value}' of group {self.group}"
        try:
            point.load()
        except Exception as error:  # the code is not ours and may raise anything
            raise ConfigError(
                f"The {self.noun} '{point.name}' cannot be imported ({where}): {type(error).__name__}: {error}. "
                "Correct or uninstall that package."
            ) from error
        if point.name not in self._entries:
            raise ConfigError(
                f"The module of {where} registers no {self.noun} of that name. Let it call register({point.name!r}, …)."
            )
