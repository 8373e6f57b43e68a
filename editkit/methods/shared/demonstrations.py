"""Demonstrations of an edit in context (IKE): three kinds, taken from a corpus of other facts, the nearest ones first.

    copy     New Fact: {prompt} {target_new}     Prompt: {prompt} {target_new}
    update   the same fact                       Prompt: {paraphrase} {target_new}
    retain   the same fact                       Prompt: {neighborhood prompt} {its own answer}

A corpus is "atlas", or a file of records in CounterFact's format, as the authors took the records that they did not
edit. How near two facts are is the cosine of their mean hidden states after the model's final norm, which needs no
other model; the authors take a sentence encoder.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from editkit.corpora import Atlas, AtlasFact, load_atlas
from editkit.errors import ConfigError
from editkit.models.load import LanguageModel
from editkit.models.precision import widened
from editkit.models.tokens import tokenise

# The kinds of 32 demonstrations, the nearest fact's first: 4 copy, 12 update, 16 retain, spread as evenly as they go.
# The authors shuffle such a list for each fact.
KINDS = ("retain", "update", "retain", "copy", "retain", "update", "retain", "update")
ROWS = 64  # of a pass; of like length, so that little is padding
DIGITS = 6  # of a cosine that count: facts that differ by less are taken in the corpus's order


@dataclass(frozen=True)
class Example:
    """A fact of a corpus, with what a demonstration of each kind asks."""

    subject: str
    prompt: str  # with its subject
    target_new: str
    paraphrase: str
    neighbor: str  # a neighborhood prompt
    neighbor_subject: str  # "" where it is not known
    answer: str  # its answer, which stays

    def demonstration(self, kind: str) -> str:
        """Its text, with an empty line behind it."""
        asked = {
            "copy": f"{self.prompt} {self.target_new}",
            "update": f"{self.paraphrase} {self.target_new}",
            "retain": f"{self.neighbor} {self.answer}",
        }[kind]
        return f"New Fact: {self.prompt} {self.target_new}\nPrompt: {asked}\n\n"


@dataclass(frozen=True, eq=False)
class Corpus:
    """The facts that demonstrations are taken from. `states`: [examples, d_model], of length 1."""

    examples: tuple[Example, ...]
    states: Tensor

    def nearest(self, lm: LanguageModel, texts: Sequence[str], subjects: Sequence[str]) -> list[Example]:
        """The examples by how near they are to the nearest of `texts`, the nearest first; those that name one of
        `subjects` are left out."""
        near = (self.states @ mean_states(lm, texts).T).amax(1)
        order = sorted(range(len(near)), key=lambda i: (-round(near[i].item(), DIGITS), i))
        ours = set(subjects)
        found = [self.examples[i] for i in order]
        return [each for each in found if not {each.subject, each.neighbor_subject} & ours]


def corpus_of(lm: LanguageModel, source: str) -> Corpus:
    """The corpus that `source` names, "atlas" or a file. Raises ConfigError for one that cannot be read."""
    examples = _of_atlas(load_atlas()) if source == "atlas" else _of_file(Path(source).expanduser())
    return Corpus(tuple(examples), mean_states(lm, [f"{each.prompt} {each.target_new}" for each in examples]))


@torch.no_grad()
def mean_states(lm: LanguageModel, texts: Sequence[str]) -> Tensor:
    """Of each text the mean hidden state of its tokens after the final norm, brought to length 1: [texts, d_model] in
    float64 on the CPU."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Tensor] = {}
    with widened(lm):
        for begin in range(0, len(order), ROWS):
            part = order[begin : begin + ROWS]
            rows = tokenise(lm, [texts[i] for i in part])
            states = lm.model.base_model(**rows.inputs(), use_cache=False).last_hidden_state.double().cpu()
            found |= {i: states[row, : rows.last(row) + 1].mean(0) for row, i in enumerate(part)}
    return normalize(torch.stack([found[i] for i in range(len(texts))]), dim=1)


def _of_atlas(atlas: Atlas) -> list[Example]:
    """An example of each fact of the atlas for which there is another subject to ask for."""
    found = []
    for fact in atlas.facts:
        others = atlas.other_objects(fact)
        # The neighbour has the same object where there is one, as CounterFact's neighborhood prompts do.
        near = [f for f in atlas.by_relation[fact.relation] if f.subject != fact.subject]
        near = [f for f in near if f.object == fact.object] or near
        if not others or not near:
            continue
        neighbor, (first, *more) = near[_pick(fact, len(near))], atlas.trained_pairs(fact)
        found.append(
            Example(
                fact.subject,
                first.format(fact.subject),
                others[_pick(fact, len(others))],
                (more or [first])[0].format(fact.subject),
                atlas.trained_pairs(neighbor)[0].format(neighbor.subject),
                neighbor.subject,
                neighbor.object,
            )
        )
    return found


def _pick(fact: AtlasFact, count: int) -> int:
    """A number below `count` that only the fact decides."""
    return int.from_bytes(hashlib.sha256(f"{fact.relation}|{fact.subject}".encode()).digest()[:8], "little") % count


def _of_file(path: Path) -> list[Example]:
    """An example of each record of a file in CounterFact's format, a JSON list."""
    try:
        records: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"method.corpus={path} cannot be read: {error}. {_FORMAT}") from error
    if not isinstance(records, list) or not records:
        raise ConfigError(f"method.corpus={path} holds no list of records. {_FORMAT}")
    found = []
    for number, record in enumerate(records):
        try:
            found.append(_of_record(record))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ConfigError(f"Record {number} of method.corpus={path} has no {error}. {_FORMAT}") from error
    return found


_FORMAT = (
    'Give "atlas", or a JSON file of records as CounterFact has them, with requested_rewrite, paraphrase_prompts and '
    "neighborhood_prompts."
)


def _of_record(record: Mapping[str, Any]) -> Example:
    rewrite = record["requested_rewrite"]
    return Example(
        rewrite["subject"],
        rewrite["prompt"].replace("{}", rewrite["subject"]),
        rewrite["target_new"]["str"],
        record["paraphrase_prompts"][0],
        record["neighborhood_prompts"][0],
        "",
        rewrite["target_true"]["str"],
    )
