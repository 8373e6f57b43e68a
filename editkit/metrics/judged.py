"""Free answers as a judge sees them (`task.judge`): the share that it calls right.

A judge reads the whole answer, up to its natural stop, as WILD does (arXiv 2502.11177): another wording of the wanted
answer is right, which `natural` does not see, and an answer that goes on to contradict itself is wrong, which
`generation` does not see. What counts as right for each kind of prompt is in `generation`; multi-hop questions are
judged one by one. Answers without a verdict (an unclear reply, a judge that was not there) are left out, and counted in
the record. How far a judge is to be trusted is not in the figure: `task.judge=exact` beside it is the least.
"""

from editkit.metrics.generation import ASKED_FREELY, answered
from editkit.metrics.metric import Metric, Protocol, register
from editkit.metrics.row_stats import Row

JUDGED = Protocol("judged", "Free answers to their natural stop: a judge calls them right")


def _verdict(row: Row, when: str) -> bool | None:
    return row.get(f"judged_{when}")


RIGHT = {
    kind: register(
        Metric(JUDGED, kind, f"share of answers to {prompts} that the judge takes for the {wanted}"),
        answered(kind, _verdict),
    )
    for kind, prompts, wanted in ASKED_FREELY
}
