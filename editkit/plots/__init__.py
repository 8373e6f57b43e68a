"""Figures for papers and notebooks, drawn with matplotlib (the extra `plots`).

One call draws one figure and returns it; a notebook shows it. With `path=` the call also writes PATH.png, PATH.pdf and
PATH.csv, the numbers that were drawn (`figure.numbers`); `save` does so later. No window opens.

    trace_map            one prompt: P(answer) by token and block, for each kind of place put back
    average_map          many facts: average indirect effect by kind of token and block
    average_lines        the same over blocks with 95 % bands, the proposed blocks marked
    lens_lines           P(word) over depth, before and after an edit
    attention_map        the last token's attention to the subject, by head and block
    stream_map           how far an edit moves the residual stream, by token and block
    side_effect_scatter  predicted against measured side effects, with their rank correlation
    spectra_lines        singular values of ΔW and of the weight
    probe_bars           probabilities of the answers before and after, by kind of prompt
    norm_map             norms of activations by module and token
    gradient_lines       sizes of outputs and gradients by module (nethook's GradientFlow)
    heat_map             any table, to one file

Colours are viridis, and those of Okabe and Ito, told apart by marker and dash as well.

**Your own plot** is a function and one line, in any file:

    from editkit import plots
    from editkit.plots.shared.canvas import blank, done

    def loss_line(losses, *, path=None):
        figure = blank(3.4, 2.4)                       # inches
        figure.subplots().plot(losses)
        return done(figure, pandas.DataFrame({"loss": losses}), path)

    plots.register("loss_line", loss_line)             # plots.loss_line(losses, path="loss")

So that an installed package's plot needs no import, its pyproject.toml names the module in the entry point group
`editkit.plots`: `loss_line = "its.module"`. Our own plots register in the same way: the modules of this folder are
imported when a plot is first asked for. matplotlib is imported when one is drawn.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError, did_you_mean
from editkit.plots.shared.canvas import save as save
from editkit.registry import Registry

if TYPE_CHECKING:  # for editors and type checkers: signatures of our own plots
    from editkit.plots.edits import *  # noqa: F403
    from editkit.plots.heat import *  # noqa: F403
    from editkit.plots.lenses import *  # noqa: F403
    from editkit.plots.modules import *  # noqa: F403
    from editkit.plots.traces import *  # noqa: F403

_PLOTS: Registry[Callable[..., Any]] = Registry("plot", group="editkit.plots")
_MODULES = [module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg]  # noqa: F405


def register(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Add a plot: from now on `editkit.plots.NAME(…)` calls `function`. Returns the function.

    `function` takes what it draws, and `path=None`; it returns a figure that `shared.canvas.done` finished. Raises
    ConfigError for a name that is taken or is not a Python name.
    """
    if not function.__module__.startswith(f"{__name__}."):
        _import_own()  # so that a name of ours is known to be taken
    if not name.isidentifier() or name in {*globals(), *_MODULES}:
        raise ConfigError(f"A plot cannot be called '{name}': give a Python name that editkit.plots does not use.")
    return _PLOTS.register(name, function, home=function.__module__)


def names() -> list[str]:
    """The names of all plots, sorted: of this package, of installed ones, and registered before."""
    _import_own()
    return _PLOTS.names()


def _import_own() -> None:
    """Let the modules of this folder register their plots. None of them imports matplotlib."""
    for module in _MODULES:
        importlib.import_module(f"{__name__}.{module}")


def __getattr__(name: str) -> Any:
    if name.startswith("_"):  # Python's own machinery asks for such names
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    if name not in names():
        raise AttributeError(f"There is no plot '{name}': {did_you_mean(name, names())}")
    return _PLOTS.get(name)


def __dir__() -> list[str]:
    return [*names(), "names", "register", "save"]
