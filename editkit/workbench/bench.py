"""Bench: what all tabs share. The model, at rest always as it was loaded; what it answers unedited; files.

Everything here is called in the worker's thread alone, one job at a time.
"""

import contextlib
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from editkit.alarm import Alarm
from editkit.corpora import AtlasFact, load_atlas
from editkit.edits import Edit, base_of
from editkit.errors import EditFileError, EditkitError, ReversalError
from editkit.facts import Fact
from editkit.methods import get_method
from editkit.metrics.audit import answers
from editkit.models.load import LanguageModel
from editkit.models.snapshot import size_in_bytes, tensors_of
from editkit.settings import MethodSettings
from editkit.workbench.recipe import Known, Made, Step, total_of

SMALL = 64 << 20  # bytes up to which all weights are compared after every job; others are, when nobody waits
KEPT = 4  # second moments and contexts of so many settings
UNTOUCHED = 20  # facts of the atlas that the alarm asks
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Verified:
    """Whether all weights are bit for bit those that were loaded."""

    equal: bool
    digest: str
    tensors: int
    bytes: int


class Bench:
    """The model of a workbench.

    - `lm`: as it is now, which is what it is brought back to after every job.
    - `folder`: everything that is written goes there, and nothing is read from elsewhere.
    """

    def __init__(self, lm: LanguageModel, folder: Path) -> None:
        self.lm, self.folder, self.base = lm, folder, base_of(lm)
        self.atlas = load_atlas()
        tensors = tensors_of(lm.model).values()
        self.tensors, self.bytes = len(tensors), size_in_bytes(tensors)
        self.parameters = lm.model.num_parameters()
        self.small = self.bytes <= SMALL
        self._shared: dict[Any, dict[str, Any]] = {}
        self._answers: list[str] | None = None
        self._alarm: Alarm | None = None
        self._files: dict[str, tuple[Path, str]] = {}

    # --- the model ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def applied(self, edit: Edit | None) -> Iterator[None]:
        """The model with `edit` in the body; what was written is put back and compared bit for bit after it."""
        with contextlib.nullcontext() if edit is None else edit.applied(self.lm, check=False, everything=False):
            yield

    def verify(self) -> Verified:
        """Compare the digest of all weights with that of the loaded model. Raises ReversalError where they differ."""
        found = self.lm.digest
        if found != self.base.digest:
            raise ReversalError(
                f"The model is {found[:12]}, and was loaded as {self.base.digest[:12]}: something else wrote to it. "
                "Start the workbench again."
            )
        return Verified(True, found, self.tensors, self.bytes)

    def shared(self, method: str, settings: MethodSettings, seed: int) -> dict[str, Any]:
        """What a method asks of the unedited model: second moments and contexts. Computed once."""
        key = method, repr(settings), seed
        if key not in self._shared:
            found = get_method(method).shared(self.lm, settings, None, seed, False)
            self._shared = dict([*self._shared.items()][1 - KEPT :]) | {key: found}
        return self._shared[key]

    def answers(self) -> Sequence[str]:
        """What the unedited model answers to every fact of the atlas."""
        if self._answers is None:
            self._answers = answers(self.lm, self.atlas, progress=False)
        return self._answers

    def alarm(self) -> Alarm:
        """The alarm of a session, made on the unedited model."""
        if self._alarm is None:
            every = len(self.atlas.facts) // UNTOUCHED
            facts = [self.fact_of(each) for each in self.atlas.facts[::every]]
            self._alarm = Alarm(self.lm, untouched=facts, say=lambda line: None)
        return self._alarm

    # --- steps --------------------------------------------------------------------------------------------------

    def compute(self, made: Made, known: Known) -> Step:
        """The step, from its file where there is one under `folder`, else computed and written there.

        The model is as it was afterwards. Raises EditkitError for a fact or settings that the method cannot take.
        """
        method = get_method(made.method)
        settings = method.settings(**made.settings)
        # 1) What is in force, and what the method asks of the unedited model.
        below = [(known[digest], strength) for digest, strength in made.on_top]
        own = [step.edit for step, _ in below if step.made.method == made.method]
        shared = self.shared(made.method, settings, made.seed)
        # 2) The edit, on top of that.
        with self.applied(total_of(self.lm, below)):
            edit = method(self.lm, made.fact, settings, seed=made.seed, progress=False, earlier=own, **shared)
        edit.save(self._edit_file(edit.digest))
        return Step(made, edit)

    def kept(self, made: Made, digest: str) -> Step | None:
        """The step of this digest from its file; None where there is no such file, or it is damaged or of another fact
        or method."""
        if not DIGEST.fullmatch(digest) or not self._edit_file(digest).is_file():
            return None
        try:
            edit = Edit.load(self._edit_file(digest))
        except EditFileError:
            return None
        how = edit.provenance
        same = how.get("method") == made.method and how.get("facts") == [asdict(made.fact)]
        return Step(made, edit) if same and edit.digest == digest else None

    def _edit_file(self, digest: str) -> Path:
        return self.folder / "edits" / f"{digest}.safetensors"

    # --- the atlas ----------------------------------------------------------------------------------------------

    def fact_of(self, each: AtlasFact) -> Fact:
        """A fact of the atlas, to be written with another answer; as it stands it has its true answer as the new."""
        new = self.atlas.other_objects(each)[0]
        return Fact(self.atlas.trained_pairs(each)[0], each.subject, new, each.object)

    def atlas_fact(self, fact: Fact) -> AtlasFact | None:
        """The fact of the atlas that `fact` is about, by its subject and phrasing; None for another."""
        for each in self.atlas.by_subject.get(fact.subject, ()):
            relation = self.atlas.relations[each.relation]
            if fact.prompt in (*relation.phrasings, *relation.held_out_phrasings):
                return each
        return None

    # --- files --------------------------------------------------------------------------------------------------

    def new_folder(self) -> Path:
        """An empty folder below the workbench's."""
        folder = self.folder / "files" / secrets.token_hex(8)
        folder.mkdir(parents=True)
        return folder

    def offer(self, path: Path, name: str) -> str:
        """The word by which a page can fetch the file, under the name `name`."""
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise EditkitError(f"'{path.name}' is not in the workbench's folder.")
        word = secrets.token_urlsafe(16)
        self._files = self._files | {word: (path, name)}  # one reference: read in another thread
        return word

    def offered(self, word: str) -> tuple[Path, str] | None:
        """The file of that word, and its name."""
        return self._files.get(word)

    def withdraw(self, words: Sequence[str]) -> None:
        """Take back what was offered, and delete the files."""
        gone = [self._files[word][0] for word in words if word in self._files]
        self._files = {word: file for word, file in self._files.items() if word not in words}
        for path in gone:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()
