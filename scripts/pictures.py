"""Draw the example pictures in docs/ from the bundled model: python scripts/pictures.py [FOLDER]."""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from editkit import LanguageModel, average_trace, load, plots, propose_layers, r_rome, trace
from editkit.data.atlas import atlas_cases
from editkit.facts import Fact
from editkit.lenses import before_and_after, logit_lens
from editkit.settings import TRACE_KINDS, TraceSettings

FACTS = 30
FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")  # conf/edit/gpt2_fact.yaml


def main(folder: Path) -> None:
    lm = load("atlas", device="cpu")
    for figure, name in (
        (plots.trace_map(trace(lm, FACT)), "trace"),
        (average(lm), "average"),
        (lens(lm), "lens"),
    ):
        for path in plots.save(figure, folder / name, kinds=("png",)):
            print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def average(lm: LanguageModel) -> Figure:
    cases = atlas_cases(FACTS, seed=0)
    found = average_trace(lm, [case.fact for case in cases], TraceSettings(kinds=TRACE_KINDS[:3]))
    proposal = propose_layers(found)
    print(proposal)
    figure: Figure = plots.average_lines(found, proposal=proposal)
    return figure


def lens(lm: LanguageModel) -> Figure:
    edit = r_rome(lm, FACT)
    before, after = before_and_after(lm, edit, lambda: logit_lens(lm, FACT.text, [FACT.target_true, FACT.target_new]))
    figure: Figure = plots.lens_lines(before, after)
    return figure


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent.parent / "docs")
