"""Which entries of GRACE's codebook answer for facts that were never edited?

    python experiments/lasting/entries.py FOLDER/atlas/grace-100     # a cell of lasting.py; README.md's table

After each of the first steps: how many entries the codebook has, how many prompts of untouched facts have a token that
an entry takes, and the entry that takes most of them.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from lasting import FACTS
from marked import between, table

import editkit
from editkit.data import load_cases
from editkit.data.kinds import NEIGHBORHOOD
from editkit.models.codebook import Codebook, books_of, taken_by
from editkit.models.load import LanguageModel
from editkit.models.tokens import tokenise
from editkit.nethook import Trace
from editkit.runs import names
from editkit.sessionfiles import read_session
from editkit.settings import DataSettings, LifelongSettings

HERE = Path(__file__).parent
STEPS = 3  # of the stream, that are looked at


def rows(folder: Path) -> Iterator[list[str]]:
    """A row after each of the first STEPS steps of a cell of GRACE."""
    lm = editkit.load("atlas", device="cpu")
    steps = read_session(folder / names.SESSION, lm).steps[:STEPS]
    contents = [each for step in steps for each in step.installed if isinstance(each, Codebook)]
    site = contents[0].module
    inputs = inputs_at(lm, site, prompts())
    for step in range(1, STEPS + 1):
        book = books_of(lm.model, contents[:step])[site]
        lengths = book.radii / book.keys.norm(dim=1)
        takers: list[set[int]] = []  # of each prompt, the entries that take one of its tokens
        for x in inputs:
            nearest, within = taken_by(x, book.keys, book.radii)
            takers.append(set(nearest[within].tolist()))
        entry, most = Counter(entry for each in takers for entry in each).most_common(1)[0]
        taken = sum(bool(each) for each in takers)
        widest = f"“{book.labels[entry]}”, {lengths[entry]:.2f} ‖K‖: {most} prompts"
        yield [
            f"{sum(len(each.labels) for each in contents[:step]):,}",
            f"{len(book.labels):,}",
            f"{lengths.median():.2f}",
            f"{taken} of {len(inputs)}",
            widest,
        ]


def prompts() -> list[str]:
    """The neighborhood prompts of the facts that the stream never edits."""
    untouched = LifelongSettings().untouched
    cases = load_cases(DataSettings(), seed=0, distinct=True).cases[FACTS : FACTS + untouched]
    return [probe.prompt for case in cases for probe in case.probes if probe.kind == NEIGHBORHOOD]


@torch.no_grad()
def inputs_at(lm: LanguageModel, site: str, texts: list[str]) -> list[torch.Tensor]:
    """The inputs [tokens, d] of a module for each text."""
    found = []
    for text in texts:
        with Trace(lm.model, site, inputs=True, outputs=False) as trace:
            lm.model(**tokenise(lm, [text]).inputs(), use_cache=False)
        found.append(trace.input[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the cell")
    head = ["edits", "entries", "median ε/‖K‖", "untouched prompts with a token taken", "the entry that takes most"]
    between(HERE / "README.md", "entries", table(head, list(rows(parser.parse_args().folder))))


if __name__ == "__main__":
    main()
