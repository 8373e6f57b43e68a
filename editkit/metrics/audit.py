"""The exhaustive audit: after an edit every fact of the atlas is asked again. Only a model of a known world allows it.

A fact is asked with the first phrasing that training showed, in free greedy generation. Its answer is the object of its
relation that the text begins with, else the text's first clause. Beside each fact stands how near it was to the edit,
from the unedited model alone:

    cosine   cos(k', k), k' [d_ff] the fact's key at the edited down-projection, k the edited fact's: the largest over
             edited facts and weights
    pull     ‖ΔW k'‖ / ‖ΔW k‖: how much of what the edit writes for its own key it also writes for this one

Both are 0 for an edit that changes no weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from editkit.corpora import Atlas, AtlasFact, load_atlas
from editkit.edits.edit import Edit
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods.shared.sites import at_lookup
from editkit.metrics.generation import exact
from editkit.metrics.metric import AFTER, COUNT, Metric, Protocol, Score, register
from editkit.metrics.scoring import score_targets
from editkit.models.experts import keys_of
from editkit.models.generate import generate_batch
from editkit.models.load import LanguageModel
from editkit.progress import Bar
from editkit.shown import Rows, Shown

BATCH = 128  # prompts side by side
SCORED = 512  # prompts between two steps of the bar, where answers are compared with those before
CHANGED = register(
    Metric(Protocol("audit", "Every fact of the atlas asked again"), "changed",
           "number of other facts of the atlas that have another answer after the edit", better=-1, unit=COUNT,
           range=(0.0, None), averaged="mean over edits", both=False)
)  # fmt: skip
SHOWN = 5  # changed facts in a notebook
KNOWN = 0.5  # share of the atlas that a model must answer to be audited with it


@dataclass(frozen=True)
class Asked:
    """One fact of the atlas, before and after an edit."""

    relation: str
    subject: str
    object: str
    before: str
    after: str
    changed: bool
    edited: bool  # it is one of the facts that were edited
    cosine: float
    pull: float


@dataclass(frozen=True, repr=False)
class Audit(Shown):
    """Every fact of the atlas, those nearest to the edit first."""

    facts: tuple[Asked, ...]

    def shown(self) -> tuple[str, Rows]:
        """How many facts were asked, and the first that have another answer."""
        changed = self.changed
        rows = [("asked", f"{len(self.facts):,} facts"), ("changed", f"{len(changed):,}, without those edited")]
        rows += [("", f"{each.subject}, {each.relation}: {each.before} → {each.after}") for each in changed[:SHOWN]]
        return "Audit", rows + ([("", f"and {len(changed) - SHOWN:,} more")] if len(changed) > SHOWN else [])

    @property
    def changed(self) -> list[Asked]:
        """The facts with another answer than before, without those that were edited."""
        return [fact for fact in self.facts if fact.changed and not fact.edited]

    @property
    def score(self) -> Score:
        """How many other facts have another answer."""
        return Score(CHANGED, AFTER, float(len(self.changed)))

    def rows(self) -> list[dict[str, Any]]:
        """A row a fact, for a table."""
        return [asdict(fact) for fact in self.facts]


def answers(
    lm: LanguageModel, atlas: Atlas | None = None, *, before: Sequence[str] | None = None, progress: bool = True
) -> list[str]:
    """What `lm`, as it is now, answers to every fact of the atlas, in the atlas's order.

    `before`: what was answered by another state of the model. A fact of which that answer, with the full stop behind
    it, is still the likeliest text, token by token, has it still, and need not be asked freely: the same answers,
    several times sooner where few have changed.
    """
    atlas = atlas or load_atlas()
    objects = {name: {each.object for each in facts} for name, facts in atlas.by_relation.items()}
    longest = {name: max(map(partial(_tokens, lm), found)) for name, found in objects.items()}
    prompts = [_fact(atlas, each).text for each in atlas.facts]
    # Side by side are prompts whose answers are about as long: a symbol need not wait for a name.
    order = sorted(range(len(prompts)), key=lambda i: (longest[atlas.facts[i].relation], len(prompts[i])))
    said: dict[int, str] = {}
    with Bar(total=len(order), desc="every fact", unit="fact", disable=not progress, delay=1, leave=False) as bar:
        for part in _parts(order, SCORED) if before is not None else ():
            assert before is not None
            scores = score_targets(lm, [prompts[i] for i in part], [f"{before[i]}." for i in part])
            same = {i: f"{before[i]}." for i, score in zip(part, scores, strict=True) if score.greedy}
            said |= same
            bar.update(len(same))
        for part in _parts([i for i in order if i not in said], BATCH):
            tokens = longest[atlas.facts[part[-1]].relation] + 1
            said |= zip(part, generate_batch(lm, [prompts[i] for i in part], tokens), strict=True)
            bar.update(len(part))
    return [_answer(said[i], objects[each.relation]) for i, each in enumerate(atlas.facts)]


def _parts(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[begin : begin + size] for begin in range(0, len(numbers), size))


def audit(
    lm: LanguageModel,
    edit: Edit,
    *,
    before: Sequence[str] | None = None,
    atlas: Atlas | None = None,
    progress: bool = True,
) -> Audit:
    """Ask everything under `lm` and under `lm` with `edit`; the model is left as it was, and that is verified.

    `before`: the `answers` of the unedited model, where they are known; `atlas`: another than the bundled one. Raises
    EditkitError for a model that does not answer half of the atlas: there is nothing to audit.
    """
    atlas = atlas or load_atlas()
    before = before or answers(lm, atlas, progress=progress)
    known = sum(answer == each.object for answer, each in zip(before, atlas.facts, strict=True)) / len(before)
    if known < KNOWN:
        raise EditkitError(
            f"'{lm.name}' answers {known:.0%} of the atlas: it does not know this world. Use model=atlas."
        )
    written = written_by(edit)
    cosine, pull = nearness(lm, edit, [_fact(atlas, each) for each in atlas.facts])
    with edit.applied(lm, check=False):
        after = answers(lm, atlas, before=before, progress=progress)
    found = [
        Asked(
            each.relation,
            each.subject,
            each.object,
            was,
            now,
            changed=was != now,
            edited=any(_same(atlas, each, fact) for fact in written),
            cosine=near,
            pull=drawn,
        )
        for each, was, now, near, drawn in zip(atlas.facts, before, after, cosine.tolist(), pull.tolist(), strict=True)
    ]
    return Audit(tuple(sorted(found, key=lambda fact: -fact.cosine)))


def written_by(edit: Edit) -> list[Fact]:
    """The facts that an edit writes; of a sum of edits, or a session's total, those of its parts."""

    def facts(provenance: Mapping[str, Any]) -> list[dict[str, str]]:
        parts = [part["provenance"] for part in provenance.get("of", [])] + provenance.get("steps", [])
        return [*provenance.get("facts", []), *(fact for part in parts for fact in facts(part))]

    return list(dict.fromkeys(Fact(**fact) for fact in facts(edit.provenance)))


def nearness(lm: LanguageModel, edit: Edit, facts: Sequence[Fact]) -> tuple[Tensor, Tensor]:
    """(cosine, pull), each [facts], of facts to those that `edit` wrote; `lm` is unedited. See the top."""
    written = written_by(edit)
    if not written:
        raise EditkitError(
            "The edit does not say which facts it writes (provenance holds none): nothing can be said of what is near "
            "to them. Audit an edit that a method of editkit computed, or a sum of such edits."
        )
    if not edit.deltas:
        return torch.zeros(len(facts), dtype=torch.float64), torch.zeros(len(facts), dtype=torch.float64)
    token = edit.provenance.get("settings", {}).get("fact_token", "subject_last")
    cosines, pulls = [], []
    for delta in edit.deltas:
        theirs, own = (  # [facts, d_ff] each
            keys_of(lm, delta.module, at_lookup(lm, delta.module, each, ["{}"], token).input[:, 0])
            for each in (facts, written)
        )
        change = delta.change()  # [d_model, d_ff]
        cosines.append((normalize(theirs, dim=-1) @ normalize(own, dim=-1).T).amax(1))
        pulls.append((theirs @ change.T).norm(dim=1) / (own @ change.T).norm(dim=1).max().clamp_min(1e-300))
    return torch.stack(cosines).amax(0), torch.stack(pulls).amax(0)


def _same(atlas: Atlas, each: AtlasFact, fact: Fact) -> bool:
    """Whether `fact` is about `each`: by the atlas's phrasings, or by its true answer where it is phrased otherwise."""
    if fact.subject != each.subject:
        return False
    of = [row.name for row in atlas.relations.values() if fact.prompt in (*row.phrasings, *row.held_out_phrasings)]
    return each.relation in of if of else fact.target_true.strip() == each.object


def _fact(atlas: Atlas, each: AtlasFact) -> Fact:
    return Fact(atlas.trained_pairs(each)[0], each.subject, each.object)


def _tokens(lm: LanguageModel, text: str) -> int:
    return len(lm.tokenizer(" " + text, add_special_tokens=False)["input_ids"])


def _answer(said: str, objects: set[str]) -> str:
    """The longest object that the text begins with; else its first clause."""
    fits = [each for each in objects if exact(said, [each])]
    return max(fits, key=len) if fits else said.split(".")[0].strip()
