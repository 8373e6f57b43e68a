"""`InstrumentedModel`: captures and edits that stay on a model, and can be listed and switched."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .names import HookError, NameNotFound, select_all
from .shown import Shown
from .trace import Change, Record, Trace, checked, hookable

OPTIONS = ("edit", "edit_input", "edit_grad")  # what a rule may change, by Trace's names


@dataclass
class Rule:
    """One named change of what passes through some sites."""

    name: str
    sites: tuple[str, ...]
    option: str  # "edit" (the output), "edit_input" or "edit_grad"
    change: Callable[[Tensor, str], Tensor]
    on: bool = True


class _Standing(Trace):
    """A Trace without a body: it stays open until closed, and needs no gradient."""

    _lenient = True


class InstrumentedModel(Shown):
    """A model with captures and edits that stay until they are removed. It is used like the model.

        with InstrumentedModel(model, retain="transformer.h.*.mlp") as im:
            im.add("louder", "transformer.h.3.mlp", edit=lambda h: 2 * h)
            im.generate(ids, max_new_tokens=5)           # whatever the model can do
            im["transformer.h.3.mlp"].output             # of the latest forward pass
            im.switch("louder", on=False)
            with im.switched("louder"): im(ids)          # on in the body, then switched back
            im.rules                                     # [Rule(name='louder', ...)]
        # here, or after im.close(), our hooks are gone

    Retained values are those of the model's latest forward pass; calls="all" keeps every run until `clear()`. Rules are
    applied in the order in which they were added, before other hooks on their sites. Gradients are captured and edited
    when a backward pass brings them; under no_grad there are none. As with Trace, only runs in the thread that made the
    last change of captures or rules are seen. The hooks are on the model itself: calling it directly applies the same
    edits.
    """

    def __init__(self, model: nn.Module, retain: str | Iterable[str] = (), **options: Any) -> None:
        self.model = model
        self._rules: dict[str, Rule] = {}
        self._retained: list[tuple[list[str], dict[str, Any]]] = []
        self._captures: list[Trace] = []
        self._traces: list[Trace] = []
        self._thread = threading.get_ident()
        self._closed = False
        self._start = model.register_forward_pre_hook(self._new_run, prepend=True)
        if retain:
            try:
                self.retain(retain, **options)
            except BaseException:
                self.close()
                raise

    def retain(self, sites: str | Iterable[str], **options: Any) -> list[str]:
        """Keep what passes through `sites` (names or patterns) from now on; returns their names.

        `options` are Trace's: inputs, outputs, grads, calls, when, positions, device, dtype, detach, clone. Several
        calls may retain different sites; for one site the latest call counts. Raises HookError for another option.
        """
        if unwanted := [name for name in (*OPTIONS, "stop", "leaf") if name in options]:
            raise HookError(f"retain() only keeps, {unwanted} is no option of it: for a change, see add().")
        names = select_all(self.model, sites)
        self._rehook([*self._retained, (names, options)], self._rules)
        return names

    def add(self, name: str, sites: str | Iterable[str], *, on: bool = True, **change: Change) -> Rule:
        """Add a rule called `name` for `sites` (names or patterns); returns it.

        `change` is one of edit=f, edit_input=f and edit_grad=f, as in Trace. `on`: whether it applies from now on.
        Raises HookError if the name is taken, or for none or several changes.
        """
        if name in self._rules:
            raise HookError(f"There is a rule '{name}' already: remove('{name}') first, or choose another name.")
        if len(change) != 1 or set(change) - set(OPTIONS):
            raise HookError(f"Rule '{name}' was given {sorted(change)}: give one of {', '.join(OPTIONS)}.")
        ((option, function),) = change.items()
        names = select_all(self.model, sites)
        rule = Rule(name, tuple(names), option, checked(f"rule '{name}' ({option})", function), on)
        self._rehook(self._retained, {**self._rules, name: rule})
        return rule

    def remove(self, name: str) -> Rule:
        """Remove the rule called `name`; returns it."""
        rule = self._rule(name)
        self._rehook(self._retained, {other: r for other, r in self._rules.items() if other != name})
        return rule

    def switch(self, name: str, on: bool) -> None:
        """Switch the rule called `name` on or off; the order of rules stays."""
        self._rule(name).on = on

    @contextmanager
    def switched(self, name: str, on: bool = True) -> Iterator[None]:
        """Switch the rule called `name` on (or off) while the body runs, then back."""
        rule = self._rule(name)
        before, rule.on = rule.on, on
        try:
            yield
        finally:
            rule.on = before

    @property
    def rules(self) -> list[Rule]:
        """The rules in the order in which they are applied."""
        return list(self._rules.values())

    @property
    def retained(self) -> list[str]:
        """Names of the retained sites."""
        return list(dict.fromkeys(site for names, _ in self._retained for site in names))

    def __getitem__(self, site: str) -> Record:
        """What is retained of `site`: .input, .output, .grad, .calls, as in a Trace."""
        for capture in reversed(self._captures):
            if site in capture.sites:
                return capture[site]
        raise NameNotFound(f"'{site}' is not retained: the retained sites are {', '.join(self.retained) or '(none)'}.")

    def clear(self) -> None:
        """Forget everything retained so far."""
        for capture in self._captures:
            capture._records.clear()

    def close(self) -> None:
        """Remove every hook. Retained values can still be read."""
        self._closed = True
        self._start.remove()
        self._unhook()

    def __enter__(self) -> "InstrumentedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.model)})  # it is used like the model

    def _ipython_key_completions_(self) -> list[str]:
        return self.retained

    def _shown(self) -> tuple[str, list[list[str]]]:
        rules = [f"{rule.name} ({'on' if rule.on else 'off'})" for rule in self.rules]
        title = f"InstrumentedModel of {type(self.model).__name__}, rules: {', '.join(rules) or 'none'}"
        rows = {row[0]: row for capture in self._captures for row in capture._rows()}
        return f"{title}, closed" if self._closed else title, list(rows.values())

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet: a copy or an unpickling under way
            raise AttributeError(name)
        return getattr(self.model, name)

    def _rule(self, name: str) -> Rule:
        if name not in self._rules:
            raise NameNotFound(f"There is no rule '{name}': the rules are {', '.join(self._rules) or '(none)'}.")
        return self._rules[name]

    def _new_run(self, called: nn.Module, _: tuple[Any, ...]) -> None:
        if called is self.model and threading.get_ident() == self._thread:
            for capture in self._captures:
                if not capture._keep_all:
                    capture._records.clear()

    def _rehook(self, retained: list[tuple[list[str], dict[str, Any]]], rules: dict[str, Rule]) -> None:
        """Replace the present hooks by those of `retained` and `rules`; on an error nothing changes.

        - `retained`: (sites, Trace's options) for each call of `retain`. `rules`: by name, in order.

        Edits are hooked first, since the hook of a capture with when="before_edit" must come before theirs.
        """
        if self._closed:
            raise HookError("This InstrumentedModel is closed: make another one.")
        # 1) make all traces, which checks them
        traces: list[Trace] = []
        edits: dict[str, dict[str, Change]] = {option: {} for option in OPTIONS}
        for rule in rules.values():
            for site in rule.sites:
                hookable(self.model, site)
                edits[rule.option][site] = self._in_order(rule.option)
        if rules:
            sites = dict.fromkeys(site for each in edits.values() for site in each)
            given: Any = {option: each or None for option, each in edits.items()}
            traces.append(_Standing(self.model, sites, outputs=False, **given))
        captures: list[Trace] = [_Standing(self.model, names, **options) for names, options in retained]
        for names, _ in retained:
            for site in names:
                hookable(self.model, site)
        # 2) exchange the hooks
        self._unhook()
        for trace in [*traces, *captures]:
            trace._open()
            self._traces.append(trace)
        # 3) keep what was captured so far
        for new, old in zip(captures, self._captures, strict=False):
            new._records = old._records
        self._retained, self._rules, self._captures = retained, rules, captures
        self._thread = threading.get_ident()

    def _unhook(self) -> None:
        while self._traces:
            self._traces.pop()._close()

    def _in_order(self, option: str) -> Change:
        """One change that applies all rules with this option, in order."""

        def apply(h: Tensor, site: str) -> Tensor:
            for rule in list(self._rules.values()):
                if rule.on and rule.option == option and site in rule.sites:
                    h = rule.change(h, site)
            return h

        return apply
