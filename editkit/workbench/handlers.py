"""What a page can ask for, by name."""

from collections.abc import Callable
from typing import Any

from editkit.errors import EditkitError
from editkit.workbench import leaving
from editkit.workbench.desk import Desk, Tell
from editkit.workbench.messages import Message

Handler = Callable[[Desk, Message, Tell], dict[str, Any]]
OF_DESK = (
    "hello", "search", "ask", "where", "method", "compute", "apply", "discard", "look", "select", "switch", "strength",
    "move", "remove", "undo", "redo", "say", "health", "audit",
)  # fmt: skip
HANDLERS: dict[str, Handler] = {name: getattr(Desk, name) for name in OF_DESK}
HANDLERS |= {"texts": leaving.texts, "file": leaving.file, "restore": leaving.restore}
# These ask nothing of the model, and change nothing of the desk: they need not wait.
AT_ONCE = frozenset({"search", "method"})
# Of these a newer one makes an older one that waits superfluous.
LATEST = frozenset({"ask", "strength", "say", "look", "select", "health", "texts"})


def answer(desk: Desk, message: Message, tell: Tell) -> dict[str, Any]:
    """Do what a message asks for; `tell` gets what is there already. Raises EditkitError for a bad message."""
    name = str(message.get("do"))
    if name not in HANDLERS:
        raise EditkitError(f"The workbench does not know the request {name[:40]!r}. Reload the page.")
    return HANDLERS[name](desk, message, tell)
