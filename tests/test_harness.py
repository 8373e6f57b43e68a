"""General ability through lm-evaluation-harness, on a task of local files."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from editkit import Fact, r_rome
from editkit.errors import EditkitError
from editkit.methods.r_rome import RRomeSettings
from editkit.metrics.harness import general_ability
from editkit.metrics.scoring import score_targets
from editkit.models.load import LanguageModel
from editkit.settings import ContextSettings, MomentSettings

needed = pytest.mark.skipif(find_spec("lm_eval") is None, reason='needs pip install "editkit[harness]"')

PROMPTS = ["The Eiffel Tower is located in the city of", "The Louvre is located in the city of"]
CITIES = ["Paris", "Rome", "Berlin"]


@needed
def test_an_edit_moves_what_the_harness_sees(atlas_lm: LanguageModel, tmp_path: Path) -> None:
    examples = [{"prompt": prompt, "choices": CITIES, "answer": 0} for prompt in PROMPTS]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, examples)))
    (tmp_path / "cities.yaml").write_text(
        f"task: cities\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{prompt}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    fact = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    settings = RRomeSettings(contexts=ContextSettings(lengths=(4,), counts=(2,)))
    edit = r_rome(atlas_lm, fact, settings, moments=MomentSettings(tokens=3000), progress=False)

    def both() -> tuple[float, float]:
        """The harness's accuracy, and ours: the likeliest of the three."""
        ours = 0.0
        for prompt in PROMPTS:
            scores = score_targets(atlas_lm, [prompt] * 3, CITIES)
            ours += max(range(3), key=lambda i: scores[i].probability) == 0
        return general_ability(atlas_lm, ["cities"], include=tmp_path)["cities"]["acc"], ours / 2

    padding, digest = atlas_lm.tokenizer.pad_token, atlas_lm.digest
    assert both() == (1.0, 1.0)
    with edit.applied(atlas_lm):
        assert both() == (0.5, 0.5)
    assert (atlas_lm.tokenizer.pad_token, atlas_lm.digest) == (padding, digest)
    assert general_ability(atlas_lm, ["cities"], include=tmp_path, limit=1)["cities"]["n"] == 1


def test_without_the_harness_its_extra_is_named(atlas_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EditkitError, match=r"no module 'lm_eval': pip install \"editkit\[harness\]\""):
        general_ability(atlas_lm, ["cities"])
