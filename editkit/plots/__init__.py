"""Pictures for papers and notebooks, drawn with matplotlib (the extra `plots`).

One call draws one figure and returns it; a notebook shows it. With `path=` the call also writes PATH.png, PATH.pdf and
PATH.csv, the numbers that were drawn (`figure.numbers`); `save` does so later. No window, no global state.

    trace_map            one prompt: P(answer) by token and block, for each kind of place put back
    average_map          many facts: average indirect effect by kind of token and block
    average_lines        the same over blocks with 95 % bands, the proposed blocks marked
    lens_lines           P(word) over depth, before and after an edit
    attention_map        the last token's attention to the subject, by head and block
    stream_map           how far an edit moves the residual stream, by token and block
    side_effect_scatter  predicted against measured side effects, with their rank correlation
    spectra_lines        singular values of ΔW and of the weight
    probe_bars           probabilities of the answers before and after, by kind of probe
    norm_map             norms of activations by module and token
    gradient_lines       sizes of outputs and gradients by module (nethook's GradientFlow)
    heat_map             any table, to one file

Colours are viridis, and those of Okabe and Ito told apart by marker and dash as well.
"""

from editkit.plots.canvas import save
from editkit.plots.edits import (
    attention_map,
    lens_lines,
    probe_bars,
    side_effect_scatter,
    spectra_lines,
    stream_map,
)
from editkit.plots.heat import heat_map
from editkit.plots.modules import gradient_lines, norm_map
from editkit.plots.traces import average_lines, average_map, trace_map

__all__ = [
    "attention_map",
    "average_lines",
    "average_map",
    "gradient_lines",
    "heat_map",
    "lens_lines",
    "norm_map",
    "probe_bars",
    "save",
    "side_effect_scatter",
    "spectra_lines",
    "stream_map",
    "trace_map",
]
