"""Every option composes; the YAML and the dataclasses agree; a wrong key is one line with the near match."""

import subprocess
import sys
from dataclasses import fields

import pytest
import yaml

from editkit.config import CONF_DIR, GROUPS, options, prepare, to_config
from editkit.config import _composed as composed
from editkit.data import formats
from editkit.data.cases import case_of
from editkit.errors import ConfigError
from editkit.methods import get_method
from editkit.metrics.scoring import score_probes
from editkit.models.load import LanguageModel
from editkit.settings import ContextSettings, DataSettings, EditSettings, ModelSettings, MomentSettings
from editkit.tasks import get_task

ALL = [(group, option) for group in GROUPS for option in options(group)]


@pytest.mark.parametrize(("group", "option"), ALL)
def test_every_option_composes(group: str, option: str) -> None:
    config = to_config(composed({group: option}))
    assert config.seed == 0 and config.device == "auto"


@pytest.mark.parametrize(("group", "option"), ALL)
def test_the_yaml_says_every_key_and_its_default(group: str, option: str) -> None:
    values = yaml.safe_load((CONF_DIR / group / f"{option}.yaml").read_text(encoding="utf-8"))
    schemas = {"data": DataSettings, "model": ModelSettings, "edit": EditSettings, "moments": MomentSettings}
    if group == "task":
        schemas["task"] = get_task(option).settings
    schema = schemas.get(group) or get_method(values.pop("name")).settings
    names = {f.name for f in fields(schema)}
    assert set(values) == names
    if group in ("method", "moments", "task"):
        config = getattr(to_config(composed({group: option})), group)
        assert config == schema(), "a default differs between conf/ and editkit/settings/"
    if group == "data":
        assert to_config(composed({group: option})).data == DataSettings(option)
    if group == "method":
        assert "contexts" not in values or set(values["contexts"]) == {f.name for f in fields(ContextSettings)}


def test_at_least_five_edits_of_different_relations() -> None:
    prompts = {to_config(composed({"edit": name})).edit.prompt for name in options("edit")}
    assert len(prompts) >= 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.layr=3", r"No key 'method\.layr': did you mean 'method\.layer'\?"),
        ("methd=rome", r"No key 'methd': did you mean 'method'\?"),
        ("method=rmoe", r"No method 'rmoe': did you mean 'rome'\?"),
        ("edit=gpt2_fct", r"No edit 'gpt2_fct': did you mean 'gpt2_fact'\?"),
        ("method.lr=fast", r"method\.lr: Value 'fast' of type 'str' could not be converted to Float"),
        ("method.layer=deep", r"method\.layer: Value 'deep'.* Integer"),
        ("matmul=tf32", r"matmul must be one of highest, high, medium; found 'tf32'"),
        ("seed=one", r"seed: Value 'one'.* Integer"),
        ("method.contexts.topk=3", r"did you mean 'method\.contexts\.top_k'\?"),
        ("method.keys=both", r"method\.keys must be one of mixed, mean; found 'both'"),
        ("method.steps=0", r"method\.steps must be positive; found 0"),
        ("method.steps=5,0", r"method\.steps must be positive; found 0"),
        ("moments.ridge=-1", r"moments\.ridge must be 0 or more; found -1"),
        ("method.contexts.counts=[1]", r"one count for each length"),
        ("+new=1", "No key 'new'"),
        ("data=counterfct", r"No data 'counterfct': did you mean 'counterfact'\?"),
        ("data.name=zsr", r"No data 'zsr': did you mean 'zsre'\?"),
        ("data.pth=x.json", r"No key 'data\.pth': did you mean 'data\.path'\?"),
        ("data.limit=0", r"data\.limit must be positive; found 0"),
        ("data.limit=few", r"data\.limit: Value 'few'.* Integer"),
        ("data.shard=4/4", r"data\.shard must be i/n with 0 ≤ i < n; found '4/4'"),
        ("data.on_bad_record=ignore", r"data\.on_bad_record must be one of skip, fail; found 'ignore'"),
        ("edit.prompt={} is in", "cannot be read as key=value"),
        ("edit", "cannot be read as key=value"),
    ],
)
def test_wrong_configurations_are_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        prepare([override])
    assert "\n" not in str(caught.value)


def test_any_model_may_be_named() -> None:
    assert prepare(["model=gpt2-xl"]) == ["model=gpt2-xl"]
    assert prepare(["model=some/folder"]) == ["model.name=some/folder"]


def test_a_trace_of_a_data_set_is_an_average() -> None:
    assert "task.average=true" in prepare(["task=trace", "data.limit=5"])
    assert prepare(["task=trace", "edit=gpt2_fact"]) == ["task=trace", "edit=gpt2_fact"]
    assert prepare(["task=trace", "data=known", "task.average=false"])[-1] == "task.average=false"
    assert prepare(["task=benchmark", "data=known"]) == ["task=benchmark", "data=known"]


def test_every_format_is_an_option_of_data() -> None:
    assert set(options("data")) == set(formats.names())


def test_a_shard_and_a_limit() -> None:
    composed_data = to_config(composed({"data": "counterfact", "data.shard": "0/4", "data.limit": "50"})).data
    assert (composed_data.shard, composed_data.limit, composed_data.path) == ("0/4", 50, None)
    overrides = ["data=counterfact", "data.shard=0/4", "data.limit=50", "data.path=../shared/data/x.json"]
    assert prepare(overrides) == overrides


def test_another_subject_clears_what_belonged_to_the_old_one() -> None:
    ready = prepare(["edit.subject=Big Ben", "edit.target_new=Rome"])
    assert "edit.target_true=''" in ready and "edit.neighborhood=[]" in ready and "edit.paraphrases=[]" not in ready
    ready = prepare(["edit.prompt='{} is in'", "edit.target_true=London"])
    assert "edit.paraphrases=[]" in ready and "edit.target_true=''" not in ready
    assert prepare(["edit.target_new=Rome"]) == ["edit.target_new=Rome"]


def test_an_error_needs_no_torch() -> None:
    code = "import sys\nfrom editkit.config import prepare\nprepare(['seed=1'])\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", options("edit"))
def test_the_shipped_edits_are_of_facts_the_model_knows(name: str, atlas_lm: LanguageModel) -> None:
    edit = to_config(composed({"edit": name})).edit
    case = case_of(edit)
    before = score_probes(atlas_lm, case.probes)
    assert not [score.probe.prompt for score in before if score.true is None or not score.true.greedy]
    assert not any(score.new_wins for score in before)
