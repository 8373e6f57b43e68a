"""Desk: one tab. Its stack of edits, its draft, what it looks at. A message becomes a call of the public functions.

Every answer is computed on the model with this tab's edits and no others: they are applied in the body of a `with`, and
taken off, bit for bit, before the next job. So a tab that is gone needs nothing but that its desk is dropped.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from editkit.edits import Edit, relative_norm
from editkit.errors import EditkitError
from editkit.methods import get_method, names
from editkit.metrics.audit import Audit, audit
from editkit.metrics.scoring import score_targets, top_next
from editkit.models.generate import generate
from editkit.models.offload import values_of
from editkit.models.tokens import tokenise
from editkit.settings import TraceSettings
from editkit.tracing import Traced
from editkit.workbench import looks, messages, recipe, where
from editkit.workbench.bench import Bench
from editkit.workbench.history import History
from editkit.workbench.messages import Message
from editkit.workbench.recipe import Made, Place, Stack, Step

DEFAULT = "r_rome"
FOUND = 12  # facts of a search
OTHERS = 60  # other answers of a relation
SAYS = 12  # tokens of the first answer
Tell = Callable[[dict[str, Any]], None]


class Desk:
    """The state of one tab of `bench`. Its methods are called in the worker's thread."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.lm, self.history = bench, bench.lm, History()
        self.draft: Step | None = None
        self.watched: list[tuple[str, str]] = []
        self.traced: Traced | None = None
        self.audited: Audit | None = None
        self.compared: dict[str, Any] | None = None
        self.offered: list[str] = []  # words of files
        self._before: tuple[Any, looks.Said] | None = None
        self._predicted: dict[tuple[str, float], list[dict[str, Any]]] = {}

    def leave(self) -> None:
        """The tab is gone: delete the files that it was offered."""
        self.bench.withdraw(self.offered)
        self.offered = []

    @property
    def stack(self) -> Stack:
        return self.history.stack

    def total(self, places: Stack | None = None) -> Edit | None:
        """The stack as one edit of the unedited model, which the model must be now; None for none."""
        return recipe.total_of(self.lm, recipe.in_force(self.stack if places is None else places))

    # --- fact, where --------------------------------------------------------------------------------------------

    def hello(self, message: Message, tell: Tell) -> dict[str, Any]:
        """The model, and the methods by name."""
        lm, base = self.lm, self.bench.base
        about = {"name": lm.name, "dtype": base.dtype, "device": str(lm.device), "blocks": lm.layers}
        about |= {"digest": base.digest, "parameters": self.bench.parameters, "small": self.bench.small}
        return {"model": about, "methods": names(), "method": self.method({"name": DEFAULT}, tell)}

    def search(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Facts of the atlas that hold all words of the text."""
        words, found = messages.text(message, "text").casefold().split(), list[dict[str, Any]]()
        atlas = self.bench.atlas
        for each in atlas.facts if words else ():
            if all(word in f"{each.subject} {each.relation} {each.object}".casefold() for word in words):
                row = _fact_json(self.bench.fact_of(each)) | {"relation": each.relation.replace("_", " ")}
                found.append(row | {"others": atlas.other_objects(each)[:OTHERS]})
                if len(found) == FOUND:
                    break
        return {"found": found}

    def ask(self, message: Message, tell: Tell) -> dict[str, Any]:
        """What the model, with the stack, says of the fact."""
        fact = messages.fact(message, asked_only=True)
        answers = [answer for answer in (fact.target_true, fact.target_new) if answer and answer != messages.NO_ANSWER]
        total = self.total()
        with self.bench.applied(total):
            rows = tokenise(self.lm, [fact.text])
            top = top_next(self.lm, fact.text, looks.NEXT)
            (says,) = generate(self.lm, [fact.text], SAYS)
            scores = score_targets(self.lm, [fact.text] * len(answers), answers)
        by_answer = dict(zip(answers, scores, strict=True))
        rated = by_answer.get(fact.target_true), by_answer.get(fact.target_new)
        verdict, sentence = looks.knows(fact, top, *rated)
        return {
            "prompt": fact.text,
            "tokens": [fact.text[begin:end] for begin, end in rows.offsets[0]],
            "next": top,
            "says": says,
            "verdict": verdict,
            "sentence": sentence,
            "probabilities": [[answer, score.probability] for answer, score in by_answer.items()],
            "edited": total is not None,
        }

    def where(self, message: Message, tell: Tell) -> dict[str, Any]:
        """The logit lens and the causal trace of the fact's prompt, on the model with the stack."""
        fact, seed = messages.fact(message, asked_only=True), messages.whole(message, "seed", *messages.SEEDS)
        samples = messages.whole(message, "samples", 1, 100) if "samples" in message else TraceSettings().samples
        with self.bench.applied(self.total()):
            tell({"lens": where.lens(self.lm, fact)})
            self.traced = where.traced(self.lm, fact, samples, seed, tell)
        return {}

    # --- edit ---------------------------------------------------------------------------------------------------

    def method(self, message: Message, tell: Tell) -> dict[str, Any]:
        """A method's settings, with the constants of this model where the default is none."""
        method = get_method(messages.text(message, "name"))
        resolved = method.settings().resolved(self.lm.name, self.lm.layers)
        rows = [row | {"resolved": _plain(getattr(resolved, row["name"]))} for row in messages.fields(method)]
        about = (method.function.__doc__ or "").strip().partition("\n")[0].partition(". ")[0].replace("`", "")
        return {"name": method.name, "about": about, "fields": rows, "blocks": list(resolved.blocks)}

    def compute(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Compute an edit as a draft, on the model with the stack; what it will do is predicted, nothing is applied."""
        # 1) What is asked for.
        fact, method = messages.fact(message), get_method(messages.text(message, "method"))
        settings = messages.settings(method, message.get("settings", {}))
        given = {row["name"]: _plain(getattr(settings, row["name"])) for row in messages.fields(method)}
        self.watched = messages.watched(message)
        on_top = tuple((step.digest, strength) for step, strength in recipe.in_force(self.stack))
        seed = messages.whole(message, "seed", *messages.SEEDS)
        # 2) The edit.
        made = Made(fact, method.name, recipe.settings_given(method.name, given), seed, on_top)
        step = self.bench.compute(made, self.history.known)
        self.history.known[step.digest] = self.draft = step
        # 3) What it will do.
        with self.bench.applied(self.total()):
            predicted, why = self._predict(step, 1.0)
            described = looks.described(self.lm, step.edit)
        return {"draft": described, "predicted": predicted, "why": why}

    def apply(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Put the draft on the stack, in force at a strength."""
        if self.draft is None:
            raise EditkitError("There is no edit to apply yet. Compute one first.")
        strength = messages.number(message, "strength", *messages.STRENGTHS) if "strength" in message else 1.0
        self.history.push(self.draft, _checked(self.draft, strength))
        self.draft = None
        return self.look(message, tell)

    def discard(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Drop the draft."""
        self.draft = None
        return {}

    # --- stack --------------------------------------------------------------------------------------------------

    def look(self, message: Message, tell: Tell) -> dict[str, Any]:
        """The stack, and before and after of the step that is looked at: the model without it, and as it is now."""
        tell({"stack": self.view()})
        place = self.history.place
        self.compared = None if place is None else self._compared(place)
        return {"compared": self.compared, "stack": self.view(whole=True)}

    def select(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Look at another step."""
        self.history.looked_at = self.stack[self._number(message)].step.digest
        return self.look(message, tell)

    def switch(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Turn a step on or off."""
        place = self.stack[number := self._number(message)]
        self.history.put(number, replace(place, on=not place.on))
        return self.look(message, tell)

    def strength(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Give a step another strength."""
        place = self.stack[number := self._number(message)]
        self.history.slide(number, _checked(place.step, messages.number(message, "value", *messages.STRENGTHS)))
        return self.look(message, tell)

    def move(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Move a step to another place."""
        self.history.move(self._number(message), self._number(message, "to"))
        return self.look(message, tell)

    def remove(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Take a step off; the others stay as they are."""
        self.history.remove(self._number(message))
        return self.look(message, tell)

    def undo(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Take back the latest change of the stack."""
        self.history.undo()
        return self.look(message, tell)

    def redo(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Do again what was undone."""
        self.history.redo()
        return self.look(message, tell)

    def say(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Free greedy text after a prompt: unedited, and with the stack."""
        prompt, tokens = messages.text(message, "prompt"), messages.whole(message, "tokens", 1, 200)
        if not prompt.strip():
            raise EditkitError("Write a prompt for the model to go on with.")
        total = self.total()
        (before,) = generate(self.lm, [prompt], tokens)
        with self.bench.applied(total):
            (after,) = generate(self.lm, [prompt], tokens)
        return {"prompt": prompt, "before": before, "after": after}

    def health(self, message: Message, tell: Tell) -> dict[str, Any]:
        """What the collapse alarm sees with the stack (alarm.py)."""
        total, alarm = self.total(), self.bench.alarm()
        if total is None:
            return {"seen": None}
        norms = {
            delta.parameter: (delta.norm(), values_of(self.lm.model, delta.parameter).double().norm().item())
            for delta in total.deltas
        }
        count = len(recipe.in_force(self.stack))
        with self.bench.applied(total):
            seen = alarm.look(count, count, norms)
        return {"seen": seen.to_json(), "limits": asdict(alarm.settings), "line": seen.line.partition(": ")[2]}

    def audit(self, message: Message, tell: Tell) -> dict[str, Any]:
        """Every fact of the atlas asked again with the stack, beside the prediction from the unedited model."""
        total = self.total()
        if total is None:
            raise EditkitError("Nothing is in force: put an edit on the stack first.")
        self.audited = audit(self.lm, total, before=self.bench.answers(), atlas=self.bench.atlas, progress=False)
        prompts = {(each.relation, each.subject): self.bench.fact_of(each).text for each in self.bench.atlas.facts}
        rows = [row | {"prompt": prompts[row["relation"], row["subject"]]} for row in self.audited.rows()]
        return {"rows": rows, "changed": len(self.audited.changed), "digest": total.digest}

    # --- inside -------------------------------------------------------------------------------------------------

    def view(self, *, whole: bool = False) -> dict[str, Any]:
        """The stack as a page shows it; `whole` adds digests and the size."""
        rows = [_place_json(place) | {"selected": place is self.history.place} for place in self.stack]
        found: dict[str, Any] = {"steps": rows, "undo": self.history.undoable, "redo": self.history.redoable}
        if whole:
            total = self.total()
            found |= {"total": total.digest, "size": relative_norm(self.lm, total)} if total is not None else {}
            if self.bench.small:
                with self.bench.applied(total):
                    found["edited"] = self.lm.digest
        return found

    def _compared(self, place: Place) -> dict[str, Any]:
        """Before and after of a step: the model without it and with it, and what was predicted."""
        fact, strength = place.step.made.fact, place.strength if place.on else 0.0
        without = self.total(tuple(each for each in self.stack if each is not place))
        total = self.total()
        below = recipe.total_of(self.lm, [(self.history.known[d], s) for d, s in place.step.made.on_top])
        with self.bench.applied(without):
            probes = looks.probes_of(self.bench, fact, self.watched)
            key = None if without is None else without.digest, tuple(probes)
            if self._before is None or self._before[0] != key:  # it is the same wherever the slider is
                self._before = key, looks.Said.now(self.lm, probes)
        with self.bench.applied(total):
            after = looks.Said.now(self.lm, probes)
        with self.bench.applied(below):
            predicted, _ = self._predict(place.step, strength)
        about = {"step": self.stack.index(place), "strength": place.strength, "on": place.on, "fact": _fact_json(fact)}
        return looks.compared(probes, self._before[1], after, predicted) | about

    def _predict(self, step: Step, strength: float) -> tuple[list[dict[str, Any]] | None, str]:
        """What the step will do to its prompts, or why that cannot be said; on the model that it was computed on."""
        if step.edit.installed:
            return None, "This edit changes no weight: what it does to other prompts is not predicted."
        key = step.digest, strength
        if key not in self._predicted:
            probes = looks.probes_of(self.bench, step.made.fact, self.watched)
            self._predicted = {key: looks.predicted_rows(self.lm, step.edit * strength, probes)}
        return self._predicted[key], ""

    def _number(self, message: Message, name: str = "number") -> int:
        if not self.stack:
            raise EditkitError("The stack is empty.")
        return messages.whole(message, name, 0, len(self.stack) - 1)


def _checked(step: Step, strength: float) -> float:
    if step.edit.installed and strength != 1:
        raise EditkitError(f"An edit by {step.made.method} changes no weight, so it has no strength but 1.")
    return strength


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _fact_json(fact: Any) -> dict[str, str]:
    return {"prompt": fact.text, "subject": fact.subject, "new": fact.target_new, "true": fact.target_true}


def _place_json(place: Place) -> dict[str, Any]:
    made = place.step.made
    return {
        "title": f"{made.fact.subject} → {made.fact.target_new}",
        "fact": _fact_json(made.fact),
        "method": made.method,
        "settings": made.settings,
        "seed": made.seed,
        "digest": place.step.digest,
        "on": place.on,
        "strength": place.strength,
        "fixed": bool(place.step.edit.installed),
        "on_top": len(made.on_top),
    }
