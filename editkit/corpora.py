"""Texts that ship with the package or that the user names: the atlas of facts, and running text.

The atlas is two readable tables in `editkit/data/atlas/`: `facts.csv` (subject, kind, relation, object)
and `relations.json` (each relation's phrasings). Which (subject, phrasing) pairs the bundled model was
trained on is a pure function of the tables, defined here and nowhere else: training, the quality script
and the benchmark all ask this file.
"""

import csv
import functools
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError

ATLAS_DIR = Path(__file__).parent / "data" / "atlas"

PAIRS_HELD_OUT = 2  # of each fact's phrasings, never the first


@dataclass(frozen=True)
class Relation:
    """A relation and the ways to say it. Every phrasing has one `{}`, and the object follows it."""

    name: str
    subject_kind: str
    object_kind: str
    phrasings: tuple[str, ...]
    held_out_phrasings: tuple[str, ...]  # never seen in training with any subject


@dataclass(frozen=True)
class AtlasFact:
    """One row of the atlas: a true statement about `subject`."""

    subject: str
    kind: str
    relation: str
    object: str


class Atlas:
    """The tables, with the look-ups that training, evaluation and the tests need."""

    def __init__(self, facts: list[AtlasFact], relations: dict[str, Relation]):
        self.facts = facts
        self.relations = relations
        self.by_subject: dict[str, list[AtlasFact]] = defaultdict(list)
        self.by_relation: dict[str, list[AtlasFact]] = defaultdict(list)
        for fact in facts:
            self.by_subject[fact.subject].append(fact)
            self.by_relation[fact.relation].append(fact)

    def held_out_pairs(self, fact: AtlasFact) -> list[str]:
        """The phrasings that training never showed with this subject (others saw them)."""
        return [p for p, held in self._split(fact) if held]

    def trained_pairs(self, fact: AtlasFact) -> list[str]:
        """The phrasings that training showed with this subject; the first is the rewrite prompt."""
        return [p for p, held in self._split(fact) if not held]

    def other_objects(self, fact: AtlasFact) -> list[str]:
        """The other objects of the fact's relation, sorted."""
        return sorted({f.object for f in self.by_relation[fact.relation]} - {fact.object})

    def unseen_phrasings(self, fact: AtlasFact) -> list[str]:
        """Phrasings of the relation that training never showed with any subject."""
        return list(self.relations[fact.relation].held_out_phrasings)

    @property
    def prompt_sorts(self) -> dict[str, Callable[[AtlasFact], list[str]]]:
        """How well a fact is known has three measures: on phrasings trained with its subject, on those trained with
        others, and on those never trained. Name of each sort, and its phrasings of a fact."""
        return {
            "trained": self.trained_pairs,
            "held-out pairs": self.held_out_pairs,
            "unseen phrasings": self.unseen_phrasings,
        }

    def _split(self, fact: AtlasFact) -> list[tuple[str, bool]]:
        phrasings = self.relations[fact.relation].phrasings
        order = sorted(
            range(1, len(phrasings)),
            key=lambda i: hashlib.sha256(f"{fact.relation}|{fact.subject}|{i}".encode()).digest(),
        )
        held = set(order[:PAIRS_HELD_OUT])
        return [(p, i in held) for i, p in enumerate(phrasings)]


@functools.cache
def load_atlas(folder: Path = ATLAS_DIR) -> Atlas:
    """Read the atlas tables. The result is shared: do not change it."""
    relations = {
        name: Relation(
            name=name,
            subject_kind=row["subject_kind"],
            object_kind=row["object_kind"],
            phrasings=tuple(row["phrasings"]),
            held_out_phrasings=tuple(row["held_out_phrasings"]),
        )
        for name, row in json.loads((folder / "relations.json").read_text(encoding="utf-8")).items()
    }
    with (folder / "facts.csv").open(encoding="utf-8", newline="") as file:
        facts = [AtlasFact(**row) for row in csv.DictReader(file)]
    return Atlas(facts, relations)


def atlas_prose(folder: Path = ATLAS_DIR) -> list[str]:
    """Paragraphs of ordinary text that name no fact of the atlas."""
    return (folder / "prose.txt").read_text(encoding="utf-8").splitlines()


def running_text(source: str, *, seed: int = 0) -> Iterator[str]:
    """Documents of running text, in a seeded order, for second moments.

    `source` is "atlas" (trained sentences of the atlas, ten to a document, between paragraphs of its
    prose), the path of a text file (a document a line; empty lines skipped), a folder that `datasets` saved
    (`save_to_disk`; of a DatasetDict the split "train"), or "hub:NAME[:CONFIG[:SPLIT]]" for a `datasets` name.
    Data sets need a column `text`. Raises ConfigError for a source that is none of these.
    """
    if source == "atlas":
        return _atlas_documents(seed)
    if source.startswith("hub:"):
        return _hub_documents(source.removeprefix("hub:"))
    path = Path(source).expanduser()
    if path.is_file():
        return _file_documents(path)
    if path.is_dir():
        return _folder_documents(path)
    raise ConfigError(
        f"No running text '{source}': it is neither 'atlas', nor a text file, nor a folder saved by `datasets`, nor "
        "hub:NAME[:CONFIG[:SPLIT]]. Set moments.source to one of these."
    )


def source_digest(source: str) -> str:
    """What a local source holds: sha256 of a file's bytes, or of what `datasets` keeps with a folder it saved, its
    fingerprint among it. "" for the others: the name says it all."""
    path = Path(source).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    states = sorted(path.rglob("state.json")) if path.is_dir() else []
    return hashlib.sha256(b"".join(state.read_bytes() for state in states)).hexdigest() if states else ""


def _atlas_documents(seed: int) -> Iterator[str]:
    atlas, rng = load_atlas(), random.Random(seed)
    sentences = [
        f"{phrasing.format(fact.subject)} {fact.object}."
        for fact in atlas.facts
        for phrasing in atlas.trained_pairs(fact)
    ]
    rng.shuffle(sentences)
    prose = atlas_prose()
    rng.shuffle(prose)
    for start in range(0, len(sentences), 10):
        yield " ".join(sentences[start : start + 10])
        if start // 10 < len(prose):
            yield prose[start // 10]


def _file_documents(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield line.strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not UTF-8 text ({error}). Set moments.source to a text file.") from error


def _folder_documents(path: Path) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ConfigError(
            f"The folder '{path}' is no data set that `datasets` saved with save_to_disk: {error}. Set moments.source "
            "to such a folder, or to a text file."
        ) from error
    if isinstance(rows, datasets.DatasetDict):
        splits = [str(split) for split in rows]
        if "train" not in splits:
            raise ConfigError(
                f"The data set in '{path}' has no split 'train': it has {', '.join(splits)}. Set moments.source to the "
                f"folder of one of them, as in '{path / (splits or ['train'])[0]}'."
            )
        rows = rows["train"]
    return _texts(rows, str(path))


def _hub_documents(name: str) -> Iterator[str]:
    import datasets

    dataset, config, split, *_ = [*name.split(":"), "", "", ""]
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
    except Exception as error:
        raise ConfigError(
            f"The data set '{name}' could not be opened through `datasets`: {error}. "
            "Set moments.source to 'atlas' or to a text file to work without the Hub."
        ) from error
    return _texts(rows, name)


def _texts(rows: Iterable[Any], name: str) -> Iterator[str]:
    """The column `text` of rows, which are mappings."""
    for row in rows:
        if "text" not in row:
            raise ConfigError(
                f"The data set '{name}' has no column 'text': it has {', '.join(row)}. Rename the column, or give "
                "another data set in moments.source."
            )
        if row["text"].strip():
            yield row["text"]
