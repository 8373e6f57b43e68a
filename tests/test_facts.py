"""Where a subject's tokens are, for tokenizers that add a BOS, put a space in front, or merge across ends."""

from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from editkit.corpora import atlas_prose
from editkit.errors import FactError
from editkit.facts import Fact
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.tokens import Rows, encode_with_targets, spaced, tokenise
from editkit.testing.tiny import tiny_lm
from tests.conftest import SHARED_DATA

TEMPLATES = [
    "{} is located in",
    "The city that is home to {} is",
    "It rained. {}'s height is",
    "({}), they say, is in",
    "{}",
]
SUBJECTS = ["The Eiffel Tower", "Rome", "Antonin Dvorak", "Zürich 東京", "B"]


def words_of(rows: Rows, row: int, position: int) -> str:
    left, right = rows.offsets[row][position]
    return rows.texts[row][left:right]


REAL = [f"real {kind}" for kind in ("gpt2", "neox") if SHARED_DATA.is_dir()]


@pytest.fixture(params=["gpt2", "llama", "own gpt2", "own neox", *REAL])
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> LanguageModel:
    """Lookup needs a tokenizer only; the model beside it is a tiny one."""
    source, _, kind = request.param.rpartition(" ")
    if not source:
        return tiny_lm(kind)
    folder = SHARED_DATA / "tokenizers" if source == "real" else own_tokenizers(tmp_path)
    if kind == "gpt2":
        vocabulary, merges = folder / "gpt2_vocab.json", folder / "gpt2_merges.txt"
        backend = ByteLevelBPETokenizer(str(vocabulary), str(merges))._tokenizer
    else:
        backend = Tokenizer.from_file(str(folder / "gpt_neox_tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    base = tiny_lm("gpt2")
    return LanguageModel(request.param, base.model, tokenizer, base.architecture)


def own_tokenizers(folder: Path) -> Path:
    """Files as GPT-2 and GPT-NeoX ship them, trained on the atlas; the second one composes accents (NFC) first."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(atlas_prose(), vocab_size=2000, special_tokens=["<|endoftext|>"], show_progress=False)
    vocabulary, merges = bpe.save_model(str(folder))
    Path(vocabulary).rename(folder / "gpt2_vocab.json")
    Path(merges).rename(folder / "gpt2_merges.txt")
    bpe._tokenizer.normalizer = normalizers.NFC()
    bpe.save(str(folder / "gpt_neox_tokenizer.json"))
    return folder


@pytest.mark.cells
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_lookup_token_covers_the_subjects_end(lm: LanguageModel, template: str, subject: str) -> None:
    rows = tokenise(lm, ["a much longer row, so that this one is padded", template.replace("{}", subject)])
    text = rows.texts[1]
    end = text.index(subject) + len(subject)
    last = lookup_position(rows, 1, template, subject)
    left, right = rows.offsets[1][last]
    assert left < end <= right
    first = lookup_position(rows, 1, template, subject, "subject_first")
    left, right = rows.offsets[1][first]
    assert left <= end - len(subject) < right
    assert lookup_position(rows, 1, template, subject, "last") == rows.last(1)


def test_a_bos_shifts_nothing() -> None:
    lm = tiny_lm("llama")
    rows = tokenise(lm, ["Rome is in"])
    assert rows.ids[0, 0] == lm.tokenizer.bos_token_id
    assert lookup_position(rows, 0, "{} is in", "Rome", "subject_first") >= 1


def test_the_token_after_the_subject(lm: LanguageModel) -> None:
    rows = tokenise(lm, ["Rome is in"])
    at = lookup_position(rows, 0, "{} is in", "Rome", "subject_first_after_last")
    assert words_of(rows, 0, at).strip()[:1] == "i"
    rows = tokenise(lm, ["In Rome"])
    with pytest.raises(FactError, match="no token after the subject"):
        lookup_position(rows, 0, "In {}", "Rome", "subject_first_after_last")


@pytest.mark.parametrize("target", ["Rome", "the Black Sea", " Vienna"])
def test_targets_are_their_own_tokens(lm: LanguageModel, target: str) -> None:
    prompt = "The Danube flows into"
    scored = encode_with_targets(lm, [prompt], [spaced(target)])
    positions = scored.positions[0]
    pieces = "".join(words_of(scored.rows, 0, i) for i in positions)
    assert pieces.replace(" ", "") == target.replace(" ", "")  # some tokenizers leave spaces out of the offsets
    assert positions == list(range(positions[0], scored.rows.last(0) + 1))
    row, at, token = scored.pick()
    assert at.tolist() == [i - 1 for i in positions] and row.tolist() == [0] * len(positions)
    assert token.tolist() == scored.rows.ids[0, positions].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("is in", "Rome", "Asia"), r"has 0 places for the subject.*one \{\}"),
        (("{} and {} are in", "Rome", "Asia"), "has 2 places"),
        (("{} is in", " ", "Asia"), "subject .* is empty"),
        (("{} is in", "Rome", " "), "target_new is empty"),
        (("{} is in", "Rome", "Italy", "Italy "), "nothing to change"),
    ],
)
def test_unusable_facts_say_why(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(FactError, match=message):
        Fact(*arguments)


def test_a_prompt_may_hold_its_subject() -> None:
    assert Fact.in_text("Today Rome is in", "Rome", "Asia").prompt == "Today {} is in"
    with pytest.raises(FactError, match="occurs 0 times"):
        Fact.in_text("Today Rome is in", "Paris", "Asia")


def test_targets_the_tokenizer_cannot_tell_or_write() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(FactError, match="unknown token"):
        Fact("{} is in", "Rome", "東京").check_targets(lm)
    with pytest.raises(FactError, match="maps .* to no tokens"):
        tokenise(tiny_lm("gpt2"), [""])


def test_texts_longer_than_the_model_are_refused(atlas_lm: LanguageModel) -> None:
    with pytest.raises(FactError, match="tokens; 'atlas' has 256 positions"):
        tokenise(atlas_lm, ["Rome " * 400])
