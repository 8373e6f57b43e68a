"""What a tab takes along: files of its stack, and the texts that make it again. And a stack made from such a text."""

import shutil
from dataclasses import replace
from typing import Any

from editkit.errors import EditkitError
from editkit.report import html
from editkit.workbench import messages, recipe
from editkit.workbench.desk import Desk, Tell
from editkit.workbench.messages import Message
from editkit.workbench.page import page_of
from editkit.workbench.recipe import Place, Step

FILES = {"edit": "edit.safetensors", "peft": "adapter.zip", "page": "workbench.html"}
LONGEST = 200_000  # characters of a state


def texts(desk: Desk, message: Message, tell: Tell) -> dict[str, Any]:
    """The Python, the command and the word of a link that make this very state."""
    total = desk.total()
    word = recipe.packed(recipe.to_json(desk.lm, desk.bench.base.digest, desk.stack, desk.history.known, total))
    return {
        "python": recipe.python(desk.lm, desk.stack, desk.history.known, total),
        "command": recipe.command(desk.lm, word) if total is not None else "",
        "state": word,
    }


def file(desk: Desk, message: Message, tell: Tell) -> dict[str, Any]:
    """Write a file of the state (FILES): the edit, a PEFT adapter, a page. Returns the word by which it is fetched."""
    what, total = messages.text(message, "what"), desk.total()
    if what not in FILES:
        raise EditkitError(f"There is no file '{what[:40]}' to write.")
    if total is None:
        raise EditkitError("Nothing is in force: there is no edit to take along.")
    path = desk.bench.new_folder() / FILES[what]
    if what == "edit":
        total.save(path)
    elif what == "peft":
        adapter = path.parent / "adapter"
        total.to_peft(adapter)
        shutil.make_archive(str(path.with_suffix("")), "zip", adapter)
        shutil.rmtree(adapter)
    else:
        html.save(page_of(desk, texts(desk, {}, tell)), path)
    word = desk.bench.offer(path, path.name)
    desk.offered.append(word)
    return {"word": word, "name": path.name, "bytes": path.stat().st_size, "digest": total.digest}


def restore(desk: Desk, message: Message, tell: Tell) -> dict[str, Any]:
    """The state of a link: each edit from its file, where the workbench's folder has it, else computed again."""
    notes = rebuild(desk, messages.text(message, "state", most=LONGEST), tell)
    return desk.look(message, tell) | {"restored": notes}


def rebuild(desk: Desk, word: str, tell: Tell) -> list[str]:
    """Put the stack of a packed recipe on the desk; what differs from it is named. Raises EditkitError for a damaged
    recipe or one of another model."""
    found = recipe.read(recipe.unpacked(word), desk.lm.name, desk.bench.base.digest)
    steps: list[Step] = []
    differing = []
    for number, (made, digest) in enumerate(found.steps):
        made = replace(made, on_top=tuple((steps[i].digest, strength) for i, strength in found.on_top[number]))
        tell({"restoring": [number + 1, len(found.steps)]})
        step = desk.bench.kept(made, digest) or desk.bench.compute(made, desk.history.known)
        desk.history.known[step.digest] = step
        steps.append(step)
        if step.digest != digest:
            differing.append(f"edit {number + 1} is now {step.digest[:12]}, and was {digest[:12]}")
    desk.history.change(tuple(Place(steps[i], on, strength) for i, on, strength in found.places))
    total = desk.total()
    if not differing and (None if total is None else total.digest) != found.total:
        differing.append("the sum of the edits has another digest")
    return [f"Computed again, {each}: another machine or version." for each in differing]
