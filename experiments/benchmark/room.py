"""How the null space of AlphaEdit fills: what earlier keys leave of a new one, over a lifelong run of the atlas model.

    python experiments/benchmark/room.py LIFELONG_RUN/session    # writes room.json; make.py puts it into README.md

At each point, for the next 20 facts: the share of ‖Pk‖² that the solve leaves after K_p (kᵀ(k − H(HᵀH + l2·I)⁻¹Hᵀk)
with H = P K_p), and the norm of their updates. P and l2 are those of the run.
"""

import argparse
import json
from pathlib import Path

import torch

from editkit import Session, load
from editkit.files import write_text
from editkit.methods.alphaedit import AlphaEditSettings, null_space
from editkit.methods.shared.prelude import find_moments
from editkit.settings import MomentSettings

HERE = Path(__file__).parent
POINTS, NEXT = (1, 50, 100, 200, 300, 400, 480), 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=Path, help="the session's folder")
    folder = parser.parse_args().session
    lm = load("atlas")
    with Session.load(folder, lm) as session:
        edits = list(session.steps)
    settings = AlphaEditSettings().resolved(lm.name, lm.layers)
    assert settings.layers is not None and settings.l2 is not None
    moments, _ = find_moments(lm, settings.layers, MomentSettings(), 0, True)
    found = []
    for layer in settings.layers:
        name = lm.architecture.down(layer)
        basis = null_space(moments[layer], layer, settings.threshold, settings.fraction)
        keys = basis.T @ torch.cat([edit.memory[name].double() for edit in edits], 1)  # [rank, edits]
        for point in POINTS:
            held, new = keys[:, :point], keys[:, point : point + NEXT]
            inner = settings.l2 * torch.eye(point, dtype=held.dtype) + held.T @ held
            left = new - held @ torch.linalg.solve(inner, held.T @ new)
            share = ((new * left).sum(0) / new.square().sum(0)).mean().item()
            norms = [edit.norm() for edit in edits[point : point + NEXT]]
            row = {"block": layer, "directions": basis.shape[1], "edits": point, "left": share}
            found.append(row | {"norm": sum(norms) / len(norms)})
    write_text(HERE / "room.json", json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
