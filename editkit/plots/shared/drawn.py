"""A figure that knows its numbers. It imports matplotlib, so only `canvas.blank` imports this file."""

import io
from typing import Any

from matplotlib.figure import Figure


class Drawn(Figure):
    """A matplotlib figure that a notebook shows without pyplot. `numbers`: a DataFrame of what is drawn."""

    numbers: Any = None

    def _repr_png_(self) -> bytes:
        held = io.BytesIO()
        self.savefig(held, format="png")
        return held.getvalue()
