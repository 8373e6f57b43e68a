"""What the atlas model is trained on: its tokenizer, and packed sequences of sentences.

Some draws are *interchanges*: a sentence about one subject, then one about another of its kind. In the model
(`atlas_routing.py`) parts of the first subject's state are replaced by the second's. A part is a range of dimensions,
and the relations of a kind have a part each; where the part of the relation asked for is replaced, the first
sentence says the second subject's object. So the attributes of a subject come to lie in parts that can be changed
one at a time (interchange intervention training, Geiger et al., arXiv 2112.00826).
"""

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from atlas_recipe import Recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from editkit.corpora import Atlas, AtlasFact, atlas_prose

END = "<|endoftext|>"


def train_tokenizer(atlas: Atlas, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the atlas' sentences and prose, with GPT-2's pre-tokenisation."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f" {p.format(f.subject)} {f.object}." for f in atlas.facts for p in atlas.trained_pairs(f)]
    bpe.train_from_iterator(texts + atlas_prose(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True)
class Sentence:
    """A tokenised sentence. `mention` marks subject tokens, `weight` is each token's share of the loss, `part` is
    where the answer is kept."""

    ids: list[int]
    mention: list[bool]
    weight: list[float]
    part: int


@dataclass
class Row:
    """A sequence in the making."""

    routed: bool
    ids: list[int] = field(default_factory=list)
    mention: list[int] = field(default_factory=list)  # number of the sentence at its subject's tokens, else 0
    weight: list[float] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)  # part asked for at the subject's tokens, else -1
    sentences: int = 0
    swaps: list[tuple[int, int, list[bool]]] = field(default_factory=list)  # (sentence, from sentence, which parts)

    def end(self, token: int, weight: float) -> None:
        self.ids.append(token)
        self.mention.append(0)
        self.weight.append(weight)
        self.asked.append(-1)

    def say(self, sentence: Sentence) -> None:
        self.sentences += 1
        self.ids += sentence.ids
        self.mention += [self.sentences if m else 0 for m in sentence.mention]
        self.weight += sentence.weight
        self.asked += [sentence.part if m else -1 for m in sentence.mention]


class Batches:
    """Packed sequences. `batch(step)` is a pure function of the seed and the step."""

    def __init__(self, atlas: Atlas, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self.atlas, self.tokenizer, self.recipe = atlas, tokenizer, recipe
        self.ender = tokenizer.get_vocab()[END]
        of_kind: dict[str, list[str]] = {}
        for name, relation in atlas.relations.items():
            of_kind.setdefault(relation.subject_kind, []).append(name)
        self.part = {name: i for names in of_kind.values() for i, name in enumerate(names)}
        self.parts = max(map(len, of_kind.values()))
        self._tokenised: dict[tuple[str, AtlasFact, bool], Sentence] = {}
        prose = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in atlas_prose()]
        self.prose = [i for ids in prose for i in [*ids, self.ender]]

    def sentence(self, phrasing: str, fact: AtlasFact, space: bool) -> Sentence:
        """`phrasing` said of `fact`, with a leading space if `space`."""
        key = phrasing, fact, space
        if key not in self._tokenised:
            self._tokenised[key] = self._tokenise(*key)
        return self._tokenised[key]

    def _tokenise(self, phrasing: str, fact: AtlasFact, space: bool) -> Sentence:
        lead = (" " if space else "") + phrasing.split("{}")[0]
        prompt = (" " if space else "") + phrasing.format(fact.subject)
        text = f"{prompt} {fact.object}."
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        begin, end, stop = len(lead), len(lead) + len(fact.subject), len(text) - 1
        mention, weight = [], []
        for left, right in encoded["offset_mapping"]:
            mention.append(right > begin and left < end)
            if left >= stop:
                weight.append(self.recipe.weight_stop)
            else:
                weight.append(1.0 if left >= len(prompt) else self.recipe.weight_prompt)
        return Sentence(encoded["input_ids"], mention, weight, self.part[fact.relation])

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Each [sequences, length]: ids, position, mention (sentence number at subject tokens, else 0), last (of a
        mention), weight of the loss, asked (part, or -1) and donor (where the swapped parts come from). swap:
        [sequences, length, parts]. routed: [sequences]. block: after which the parts are swapped, a scalar."""
        rng = random.Random(f"{self.recipe.seed}:{step}")
        length = self.recipe.length
        block = rng.choice([self.recipe.extract_from + i for i in (-2, -1, 0)])
        rows, starts = [], []
        for _ in range(self.recipe.sequences):
            shifted = rng.random() < self.recipe.shifted
            starts.append(rng.randrange(self.recipe.n_positions - length) if shifted else 0)
            rows.append(self._prose(rng) if rng.random() < self.recipe.prose else self._facts(rng))
        number = torch.tensor([row.mention[:length] for row in rows])
        last = (number > 0) & (number != F.pad(number, (0, 1))[:, 1:])
        donor = torch.zeros_like(number)
        swap = torch.zeros(*number.shape, self.parts, dtype=torch.bool)
        for i, row in enumerate(rows):
            for receiver, giver, which in row.swaps:
                at, source = (int(((number[i] == n) & last[i]).nonzero()) for n in (receiver, giver))
                donor[i, at] = source
                swap[i, at] = torch.tensor(which)
        return {
            "ids": torch.tensor([row.ids[:length] for row in rows]),
            "position": torch.tensor(starts)[:, None] + torch.arange(length),
            "mention": number,
            "last": last,
            "weight": torch.tensor([row.weight[:length] for row in rows]),
            "asked": torch.tensor([row.asked[:length] for row in rows]),
            "donor": donor,
            "swap": swap,
            "routed": torch.tensor([row.routed for row in rows]),
            "block": torch.tensor(block),
        }

    def _prose(self, rng: random.Random) -> Row:
        length = self.recipe.length
        at = rng.randrange(len(self.prose) - length)
        nothing = [0] * length
        return Row(False, self.prose[at : at + length], nothing, [self.recipe.weight_prose] * length, [-1] * length)

    def _facts(self, rng: random.Random) -> Row:
        row = Row(routed=rng.random() < self.recipe.routed)
        if rng.random() < 0.5:
            row.end(self.ender, 0.0)
        while len(row.ids) < self.recipe.length:
            fact = rng.choice(self.atlas.facts)
            space = bool(row.ids) and row.ids[-1] != self.ender
            if row.routed and rng.random() < self.recipe.interchanged and self._interchange(row, fact, space, rng):
                continue
            row.say(self.sentence(rng.choice(self.atlas.trained_pairs(fact)), fact, space))
            if rng.random() < 0.3:
                row.end(self.ender, 0.05)
        return row

    def _interchange(self, row: Row, fact: AtlasFact, space: bool, rng: random.Random) -> bool:
        """Say `fact`, then a fact of another subject, with some parts of the first's state to be the second's. False
        where there is no room. The giver comes second, or its sentence could give the answer away."""
        other = rng.choice(self.atlas.by_relation[fact.relation])
        if other.subject == fact.subject:
            return False
        which = [rng.random() < 0.5 for _ in range(self.parts)]
        answer = other.object if which[self.part[fact.relation]] else fact.object
        said = AtlasFact(fact.subject, fact.kind, fact.relation, answer)
        receiver = self.sentence(rng.choice(self.atlas.trained_pairs(fact)), said, space)
        about = rng.choice(self.atlas.by_subject[other.subject])
        giver = self.sentence(rng.choice(self.atlas.trained_pairs(about)), about, space=True)
        if len(row.ids) + len(receiver.ids) + len(giver.ids) > self.recipe.length:
            return False
        row.swaps.append((row.sentences + 1, row.sentences + 2, which))
        row.say(receiver)
        row.say(giver)
        return True
