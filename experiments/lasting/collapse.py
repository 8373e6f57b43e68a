"""A collapse provoked: the alarm's line, the rollback, and the weights of the last good step, compared by digest.

    python experiments/lasting/collapse.py            # prints what happened, writes collapse.json

FT without a bound, at a learning rate that is far too high, edits the bundled model fact after fact. Two sessions: one
with an alarm that rolls back, which folds its older steps, and one that makes the good steps alone and keeps them all.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from editkit import Alarm, CollapseError, Session, load
from editkit.data import load_cases
from editkit.files import write_text
from editkit.methods.ft import FtSettings
from editkit.models.snapshot import model_digest
from editkit.settings import AlarmSettings, DataSettings

HERE = Path(__file__).parent
SETTINGS = FtSettings(lr=5e-3)
EVERY, KEEP, MOST = 5, 3, 200  # steps between two looks, steps kept, steps at most
LIMITS = AlarmSettings(every=EVERY)


def main() -> None:
    lm = load("atlas", device="cpu")
    begun = model_digest(lm.model)
    cases = load_cases(replace(DataSettings(), limit=MOST + 20), distinct=True).cases
    facts, untouched = [case.fact for case in cases[:MOST]], [case.fact for case in cases[MOST:]]
    said: list[str] = []
    alarm = Alarm(lm, LIMITS, untouched=untouched, on_collapse="rollback", say=said.append)
    good: dict[int, str] = {}
    seen: list[dict[str, Any]] = []
    # 1) Edit until the alarm takes the session back.
    with Session(lm, "ft", SETTINGS, alarm=alarm, keep=KEEP, progress=False) as session:
        try:
            for fact in facts:
                session.edit(fact)
                if session.count % EVERY == 0 and (look := session.look()):
                    good[session.count] = model_digest(lm.model)
                    seen.append({"step": session.count} | look.to_json())
        except CollapseError as error:
            seen.append({"step": error.seen.step} | error.seen.to_json())
            back, outcome, dropped = model_digest(lm.model), error.outcome, len(error.dropped)
            kept = error.kept
        else:
            raise SystemExit(f"no limit was passed in {MOST} steps")
    restored = model_digest(lm.model)
    # 2) The good steps alone.
    with Session(lm, "ft", SETTINGS, progress=False) as alone:
        for fact in facts[:kept]:
            alone.edit(fact)
        never = model_digest(lm.model)
    found: dict[str, Any] = {
        "line": said[-1],
        "outcome": outcome,
        "dropped": dropped,
        "looks": seen,
        "digests": {
            f"after step {kept}, at the look": good[kept],
            "after the rollback": back,
            f"of {kept} steps that were never followed by others": never,
            "before the session": begun,
            "after it": restored,
        },
    }
    print(found["line"], found["outcome"], sep="\n")
    for what, digest in found["digests"].items():
        print(f"{digest[:16]}  {what}")
    write_text(HERE / "collapse.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if not good[kept] == back == never != begun or restored != begun:
        raise SystemExit("the digests are not as they should be")


if __name__ == "__main__":
    main()
