"""The atlas tables: what DESIGN asks of them, and that the split of training is stable."""

import collections
from pathlib import Path

import datasets
import pytest

from editkit.corpora import PAIRS_HELD_OUT, atlas_prose, load_atlas, running_text, source_digest
from editkit.errors import ConfigError

atlas = load_atlas()


def test_size() -> None:
    assert len(atlas.facts) >= 1500
    assert len(atlas.relations) >= 20
    assert all(len(r.phrasings) >= 5 and r.held_out_phrasings for r in atlas.relations.values())


def test_rows_are_clean() -> None:
    for fact in atlas.facts:
        for cell in (fact.subject, fact.kind, fact.relation, fact.object):
            assert cell and cell == cell.strip() and "{" not in cell
        assert fact.relation in atlas.relations
        assert atlas.relations[fact.relation].subject_kind == fact.kind
    assert len({(f.subject, f.relation) for f in atlas.facts}) == len(atlas.facts)
    kinds = collections.defaultdict(set)
    for fact in atlas.facts:
        kinds[fact.subject].add(fact.kind)
    assert all(len(k) == 1 for k in kinds.values())


def test_no_phrasing_serves_two_relations() -> None:
    phrasings = [p for r in atlas.relations.values() for p in (*r.phrasings, *r.held_out_phrasings)]
    assert len(phrasings) == len(set(phrasings))
    assert all(p.count("{}") == 1 for p in phrasings)


def test_edits_can_be_punished() -> None:
    several = [s for s, facts in atlas.by_subject.items() if len(facts) > 1]
    assert len(several) > len(atlas.by_subject) / 2
    assert sum(f.object in atlas.by_subject for f in atlas.facts) > 200  # second hops
    for relation, facts in atlas.by_relation.items():
        assert len({f.object for f in facts}) > 1, relation


def test_held_out_pairs_are_never_trained() -> None:
    for fact in atlas.facts:
        trained, held = atlas.trained_pairs(fact), atlas.held_out_pairs(fact)
        assert len(held) == PAIRS_HELD_OUT
        assert not set(trained) & set(held)
        assert trained[0] == atlas.relations[fact.relation].phrasings[0]
    # Not inside a longer subject: "Republic of the Congo" ends "Democratic Republic of the Congo".
    sentences = {f". {p.format(f.subject)} {f.object}." for f in atlas.facts for p in atlas.held_out_pairs(f)}
    text = ". " + " ".join(running_text("atlas"))
    assert not any(sentence in text for sentence in sentences)


def test_running_text_is_seeded() -> None:
    first, again, other = (list(running_text("atlas", seed=s)) for s in (0, 0, 1))
    assert first == again != other
    assert sorted(atlas_prose())[0] in first


def test_a_text_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\n\n two \n", encoding="utf-8")
    assert list(running_text(str(path))) == ["one", "two"]


def test_an_unknown_source_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"neither 'atlas', nor a text file.*moments\.source"):
        list(running_text("/no/such/file"))


def test_a_folder_saved_by_datasets_is_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["one", " ", "two"], "id": [1, 2, 3]})
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    for name in ("rows", "splits"):
        assert list(running_text(str(tmp_path / name))) == ["one", "two"]


def test_folders_without_text_say_what_they_have(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    rows = datasets.Dataset.from_dict({"words": ["one"]})
    rows.save_to_disk(tmp_path / "words")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "test")
    for name, message in (
        ("empty", "no data set that `datasets` saved"),
        ("words", "no column 'text': it has words"),
        ("test", r"no split 'train': it has test.*test/test'"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(running_text(str(tmp_path / name)))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        list(running_text(str(tmp_path / "text.txt")))


def test_the_digest_of_a_source_follows_its_content(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    found = set()
    for text in ("one", "two", "one"):
        path.write_text(text, encoding="utf-8")
        found.add(source_digest(str(path)))
        datasets.Dataset.from_dict({"text": [text]}).save_to_disk(tmp_path / text)
        found.add(source_digest(str(tmp_path / text)))
    assert len(found) == 4
    assert source_digest("atlas") == source_digest("hub:wikitext") == ""
