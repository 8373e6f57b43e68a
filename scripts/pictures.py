"""Draw the pictures of docs/ from the bundled model, by editkit's own plots: some minutes on one core.

    python scripts/pictures.py                            # all of them
    python scripts/pictures.py lens gallery/stream_map    # some

A picture is a method of `Pictures`; docs/gallery.md shows each, and says what is to be seen. Files are kept small: 160
dots an inch, and 256 colours.
"""

import argparse
import io
import math
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from editkit import (
    Edit,
    attention_to_subject,
    average_trace,
    load,
    memit,
    plots,
    propose_layers,
    r_rome,
    side_effects,
    stream_change,
    trace,
)
from editkit.activations.probes import activation_norms
from editkit.data.atlas import atlas_cases
from editkit.data.cases import Case, Probe
from editkit.data.kinds import NEIGHBORHOOD, SAME_SUBJECT
from editkit.edits import spectra
from editkit.facts import Fact
from editkit.files import write_bytes
from editkit.lenses import before_and_after, logit_lens
from editkit.metrics.measure import Row, look, rows_of
from editkit.metrics.scoring import score_targets
from editkit.nethook import Callbacks, GradientFlow, select
from editkit.settings import TRACE_KINDS, MeasureSettings, TraceSettings
from editkit.tasks.common import spectrum_beside
from editkit.tracing import AverageTrace, Proposal

DOCS = Path(__file__).resolve().parent.parent / "docs"
DPI, COLOURS = 160, 256
TRACED, EDITED = 30, 20  # facts
FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")  # conf/edit/gpt2_fact.yaml


class Pictures:
    """The figures, by name; what several of them need is computed once."""

    def __init__(self) -> None:
        self.lm = load("atlas", device="cpu")

    # --- what they share ------------------------------------------------------------------------------------------

    @cached_property
    def edit(self) -> Edit:
        """The edit of FACT by r_rome."""
        return r_rome(self.lm, FACT)

    @cached_property
    def cases(self) -> list[Case]:
        """Facts of the atlas with their probes."""
        return list(atlas_cases(EDITED, seed=0))

    @cached_property
    def edits(self) -> list[Edit]:
        """One edit for each of `cases`."""
        return [r_rome(self.lm, case.fact) for case in self.cases]

    @cached_property
    def traced(self) -> tuple[AverageTrace, Proposal]:
        """The average trace of many facts, and the blocks that it proposes."""
        facts = [case.fact for case in atlas_cases(TRACED, seed=0)]
        found = average_trace(self.lm, facts, TraceSettings(kinds=TRACE_KINDS[:3]))
        return found, propose_layers(found)

    # --- where a fact is ------------------------------------------------------------------------------------------

    def trace(self) -> Any:
        """One prompt, by token and block."""
        return plots.trace_map(trace(self.lm, FACT))

    def severed(self) -> Any:
        """The same with the MLPs, or the attention, of later blocks cut off."""
        return plots.trace_map(trace(self.lm, FACT, TraceSettings(kinds=("state", "severed_mlp", "severed_attention"))))

    def average(self) -> Any:
        """Many facts, over blocks."""
        found, proposal = self.traced
        return plots.average_lines(found, proposal=proposal)

    def average_map(self) -> Any:
        """Many facts, by kind of token and block."""
        found, proposal = self.traced
        return plots.average_map(found, proposal=proposal)

    def attention_map(self) -> Any:
        """Which heads look at the subject."""
        return plots.attention_map(attention_to_subject(self.lm, FACT))

    # --- what an edit does ----------------------------------------------------------------------------------------

    def lens(self) -> Any:
        """Both answers over depth, before and after."""
        words = [FACT.target_true, FACT.target_new]
        return plots.lens_lines(*before_and_after(self.lm, self.edit, lambda: logit_lens(self.lm, FACT.text, words)))

    def stream_map(self) -> Any:
        """How far the residual stream moves."""
        return plots.stream_map(stream_change(self.lm, self.edit, FACT.text))

    def probe_bars(self) -> Any:
        """Probabilities of the answers, by kind of prompt."""
        how = MeasureSettings(fluency=0)
        rows: list[Row] = []
        for case, edit in zip(self.cases, self.edits, strict=True):
            before, after = before_and_after(self.lm, edit, partial(look, self.lm, case, how))
            rows += rows_of(case, before, after)
        return plots.probe_bars(rows, title=f"{EDITED} facts, each edited alone by r_rome")

    def side_effect_scatter(self) -> Any:
        """Other prompts: how far the edited weight's output is predicted to move, and how far log p does."""
        predicted: list[float] = []
        measured: list[float] = []
        owners: list[int] = []
        for number, (case, edit) in enumerate(zip(self.cases, self.edits, strict=True)):
            probes = [probe for probe in case.probes if probe.kind in (NEIGHBORHOOD, SAME_SUBJECT)]
            predicted += side_effects(self.lm, edit, [probe.prompt for probe in probes]).relative.tolist()
            before, after = before_and_after(self.lm, edit, partial(self._nll, probes))
            moved = [abs(a - b) for a, b in zip(after, before, strict=True)]
            measured += [value if value > 0 else math.nan for value in moved]  # no place on a log axis
            owners += [number] * len(probes)
        names = {"predicted_name": "predicted ‖ΔW k′‖ / ‖m‖", "measured_name": "measured |Δ log p| (nats a token)"}
        return plots.side_effect_scatter(predicted, measured, owners, log=True, **names)

    def _nll(self, probes: list[Probe]) -> list[float]:
        targets = [probe.target_true for probe in probes]
        return [each.nll for each in score_targets(self.lm, [probe.prompt for probe in probes], targets)]

    def spectra_lines(self) -> Any:
        """Singular values of the ΔW of many facts, beside those of the weights."""
        edit = memit(self.lm, [case.fact for case in self.cases])
        found = [spectrum_beside(self.lm, each) for each in spectra(edit)]
        return plots.spectra_lines(found, title=f"MEMIT, {EDITED} facts in one edit")

    # --- what passes through a model ------------------------------------------------------------------------------

    def norm_map(self) -> Any:
        """Norms of MLPs' outputs."""
        norms = activation_norms(self.lm, FACT.text, select(self.lm.model, "transformer.h.*.mlp"))
        return plots.norm_map(norms, title="L2 norm of the MLPs' outputs")

    def gradient_lines(self) -> Any:
        """Outputs and gradients of two steps, by block."""
        flow, ids = GradientFlow(), self.lm.tokenizer(f"{FACT.text} Paris.", return_tensors="pt").input_ids
        parameters = "transformer.h.*.mlp.c_proj.weight"
        with Callbacks(self.lm.model) as callbacks:
            callbacks.add(flow, select(self.lm.model, "transformer.h.*"), parameters=parameters)
            for batch in callbacks.steps([ids] * 2):
                self.lm.model(batch, labels=batch).loss.backward()
        self.lm.model.zero_grad()
        return plots.gradient_lines(flow.table())


IN_DOCS = ("trace", "average", "lens")  # the README and other pages show them; the others are in docs/gallery
NAMES = [
    name if name in IN_DOCS else f"gallery/{name}"
    for name, member in vars(Pictures).items()
    if callable(member) and not name.startswith("_")
]


def save(figure: Any, path: Path) -> int:
    """Write a figure as a small PNG; how many bytes. The same figure gives the same bytes."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    write_bytes(path, small.getvalue())
    return len(small.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; default: all")
    parser.add_argument("--into", type=Path, default=DOCS, metavar="FOLDER", help="default: docs/")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"no picture {', '.join(unknown)}; there are {', '.join(NAMES)}")
    pictures = Pictures()
    for name in options.names or NAMES:
        path = options.into / f"{name}.png"
        size = save(getattr(pictures, Path(name).name)(), path)
        print(f"{path}: {size / 1024:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
