"""A method, a data format and a model family of another package: one file each, and no file of editkit is touched."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
from hydra.core.config_store import ConfigStore
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

import editkit
from editkit import Edit, methods
from editkit.config import offer_all, prepare
from editkit.data import formats
from editkit.errors import ConfigError
from editkit.models import architecture
from editkit.settings import MethodSettings
from editkit.testing.tiny import tiny_lm

NUDGE = '''
"""Nudge: a random change of one block along the subjects' keys."""
from dataclasses import dataclass
from typing import ClassVar

import torch

from editkit import Edit
from editkit.edits import base_of, low_rank_delta
from editkit.methods import register
from editkit.methods.shared.prelude import checked_facts, provenance
from editkit.methods.shared.sites import at_lookup
from editkit.settings import Constants, MethodSettings, require


@dataclass(frozen=True)
class NudgeSettings(MethodSettings):
    constants: ClassVar[Constants] = Constants({"size": 0.5}, {"atlas": {"size": 2.0}}, blocks="layer")

    layer: int | None = None  # block to edit
    size: float | None = None  # norm of each change

    def __post_init__(self):
        super().__post_init__()
        require(self.size is None or self.size > 0, "method.size", self.size, "positive")


def nudge(lm, facts, settings=None, *, seed=0):
    facts = checked_facts(lm, facts)
    settings = (settings or NudgeSettings()).resolved(lm.name, lm.layers)
    site = lm.architecture.down(lm.check_layer(settings.layer))
    keys = at_lookup(lm, site, facts, ["{}"], "subject_last").input[:, 0]  # [n, d_ff]
    keys = keys / keys.norm(dim=1, keepdim=True)
    left = torch.randn(lm.model.config.n_embd, len(keys), generator=torch.Generator().manual_seed(seed)).double()
    delta = low_rank_delta(lm, site, settings.size * left / left.norm(dim=0), keys)
    return Edit((delta,), base_of(lm), provenance("nudge", settings, facts, seed=seed))


register("nudge", nudge, NudgeSettings)
'''

QUIZ = '''
"""Quiz: {"about": subject, "question": prompt, "say": target_new, "not": target_true}."""
from editkit.data.cases import REWRITE, Case, Probe
from editkit.data.fields import fact_of_text
from editkit.data.formats import register


def quiz(raw):
    fact = fact_of_text("question", raw.text("question"), raw.text("about"), raw.text("say"), raw.text("not"))
    return Case((fact,), (Probe(REWRITE, fact.text, fact.target_true, fact.target_new),))


register("quiz", quiz, marks=[("about", "question", "say")])
'''

FAMILY = '''
"""GPT-BigCode (StarCoder)."""
from editkit.models.architecture import Architecture, register

H = "transformer.h.{}"
register(
    Architecture(
        "gpt_bigcode",
        embedding="transformer.wte",
        block=H,
        attention=f"{H}.attn",
        mlp=f"{H}.mlp",
        down_projection=f"{H}.mlp.c_proj",
        final_norm="transformer.ln_f",
    )
)
'''

POINTS = """
[editkit.methods]
nudge = outside_nudge
broken = outside_broken
silent = outside_silent

[editkit.data]
quiz = outside_quiz

[editkit.families]
gpt_bigcode = outside_family
"""

RECORDS = [
    {"about": "France", "question": "The capital of France is", "say": "Madrid", "not": "Paris"},
    {"about": "Spain", "question": "The capital of Spain is", "say": "Oslo", "not": "Madrid"},
]
FILES = {"outside_nudge.py": NUDGE, "outside_quiz.py": QUIZ, "outside_family.py": FAMILY}
PACKAGE = Path(editkit.__file__).parent


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with another package's three modules, a model of its family and a file of its format."""
    folder = tmp_path_factory.mktemp("outside")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "facts.json").write_text(json.dumps(RECORDS))
    tokenizer = tiny_lm("gpt2").tokenizer
    config = GPTBigCodeConfig(vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=4, n_inner=64, n_positions=256)
    GPTBigCodeForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def installed(outside: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the metadata that an installation writes: entry points, two of them not as they should be."""
    folder = tmp_path_factory.mktemp("installed")
    for path in outside.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "outside_broken.py").write_text("import no_such_module\n")
    (folder / "outside_silent.py").write_text("")
    metadata = folder / "outside-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(POINTS)
    return folder


@pytest.fixture
def imported(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The installed package in this process; what it registered is taken out again."""
    monkeypatch.syspath_prepend(installed)
    yield
    methods.unregister("nudge")
    formats.unregister("quiz")
    architecture.unregister("gpt_bigcode")
    for name in [name for name in sys.modules if name.startswith("outside_")]:
        del sys.modules[name]


def run(*arguments: str, path: Path, cwd: Path) -> str:
    """What a command prints, with `path` importable."""
    paths = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")]), str(PACKAGE.parent)])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sweep_over_our_method_and_an_installed_one(installed: Path, tmp_path: Path) -> None:
    asked = ["method=rome,nudge", "method.layer=4", "moments.tokens=2000"]
    printed = run("-m", "editkit.run", "-m", *asked, path=installed, cwd=tmp_path)
    table = pandas.read_csv(tmp_path / printed.splitlines()[-1])
    assert list(table["method.name"]) == ["rome", "nudge"]
    assert list(table["counterfact.ES_after"])[:1] == [1.0] and list(table["reversal_exact"]) == [True, True]


def test_method_format_and_family_of_an_installed_package(installed: Path, tmp_path: Path) -> None:
    asked = ["task=benchmark", "method=nudge", "method.size=3", "data=quiz", f"data.path={installed / 'facts.json'}"]
    asked += [f"model={installed / 'model'}", "task.measure.fluency=0"]
    printed = run("-m", "editkit.run", *asked, path=installed, cwd=tmp_path)
    check_record(tmp_path / printed.splitlines()[-1], size=3.0)


def test_the_same_registered_by_a_script(outside: Path, tmp_path: Path) -> None:
    """Without entry points; a YAML file of a folder of its own sets what it likes."""
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "strong.yaml").write_text("name: nudge\nsize: 7\nlayer: null\ntransform: null\n")
    code = "import outside_nudge, outside_quiz, outside_family; from editkit.run import main; main()"
    asked = ["task=benchmark", "method=strong", "data=quiz", f"data.path={outside / 'facts.json'}"]
    asked += [f"model={outside / 'model'}", "task.measure.fluency=0", "--config-dir", "conf"]
    printed = run("-c", code, *asked, path=outside, cwd=tmp_path)
    check_record(tmp_path / printed.splitlines()[-1], size=7.0)


def check_record(folder: Path, size: float) -> None:
    record = json.loads((folder / "record.json").read_text())
    assert record["config"]["method"] == {
        "name": "nudge",
        "transform": None,
        "simie": None,
        "layer": None,
        "size": size,
    }
    assert record["config"]["data"]["name"] == "quiz" and record["data"]["found"] == 2
    assert record["reversal"]["exact"]


@pytest.mark.usefixtures("imported")
def test_what_the_command_line_says_of_an_installed_method() -> None:
    assert prepare(["method=nudge", "method.size=2"]) == ["method=nudge", "method.size=2"]
    with pytest.raises(ConfigError, match=r"No method 'nugde': did you mean 'nudge'\?"):
        prepare(["method=nugde"])
    with pytest.raises(ConfigError, match=r"No key 'method\.siz': did you mean 'method\.size'\?"):
        prepare(["method=nudge", "method.siz=2"])
    with pytest.raises(ConfigError, match=r"method\.size must be positive; found -2"):
        prepare(["method=nudge", "method.size=-2"])
    with pytest.raises(ConfigError, match=r"No data 'quizz': did you mean 'quiz'\?"):
        prepare(["data=quizz"])


@pytest.mark.usefixtures("imported")
def test_a_shell_completes_an_installed_method() -> None:
    """Of the one that the line chooses its keys too; of the others the name alone, and nothing is imported for it."""
    offer_all(["method=nudge", "method.si", "data=nonsense=x"])
    of_method = ConfigStore.instance().repo["method"]
    assert {"name", "size", "layer"} <= {*of_method["nudge.yaml"].node}
    assert {*of_method["broken.yaml"].node} == {*of_method["silent.yaml"].node} == {"name"}
    assert "outside_broken" not in sys.modules and "outside_silent" not in sys.modules


@pytest.mark.usefixtures("imported")
def test_an_entry_point_that_does_not_work_is_named_and_harms_no_other() -> None:
    with pytest.raises(ConfigError, match="The method 'broken' cannot be imported .*No module named 'no_such_module'"):
        methods.get_method("broken")
    with pytest.raises(ConfigError, match=r"registers no method of that name\. Let it call register\('silent', …\)"):
        methods.get_method("silent")
    with pytest.warns(UserWarning, match="'broken' cannot be imported"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*silent")
        found = methods.all_methods()
    assert {"rome", "nudge"} <= {*found} and not {"broken", "silent"} & {*found}
    assert {"rome", "nudge", "broken", "silent"} <= {*methods.names()}  # nothing is imported for names


@pytest.mark.usefixtures("imported")
def test_registration_is_checked() -> None:
    def good(lm: Any, facts: Any, settings: Any = None, *, moments: Any = None) -> Edit:
        raise NotImplementedError

    for name in ("rome", "nudge"):
        methods.get_method("nudge")
        with pytest.raises(ConfigError, match=f"A method '{name}' is registered already by .*{name}"):
            methods.register(name, good, MethodSettings)
    with pytest.raises(ConfigError, match=r"must be \(lm, facts, settings, \*, …\)"):
        methods.register("bad", lambda lm, facts: good(lm, facts), MethodSettings)
    with pytest.raises(ConfigError, match="must be a dataclass below MethodSettings"):
        methods.register("bad", good, dict)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="A data 'zsre' is registered already by editkit.data.formats.zsre"):
        formats.register("zsre", good)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs either `read`, or `make` and `digest`"):
        formats.register("bad")
    with pytest.raises(ConfigError, match="A model family 'gpt2' is registered already"):
        architecture.register(architecture.Architecture("gpt2", "", "", "", "", "", None))
    assert "bad" not in methods.names() and "bad" not in formats.names()


def test_a_method_takes_the_options_of_its_signature() -> None:
    taken = {name: method.takes for name, method in methods.all_methods().items()}
    shared = {"seed", "moments", "contexts", "progress"}
    assert taken["rome"] == shared and taken["alphaedit"] == shared | {"earlier", "carried"}
    assert taken["memit"] == taken["memit_seq"] == shared | {"earlier", "carried"}
    assert [set(taken[name]) for name in ("ft", "lora", "mend")] == [
        {"progress"},
        {"seed", "progress"},
        {"earlier", "carried"},
    ]
    with pytest.raises(TypeError, match="no method takes sede"):
        methods.get_method("ft")(tiny_lm("gpt2"), [], sede=1)


@pytest.mark.parametrize(
    ("folder", "names", "may"),
    [
        ("methods", methods.names(), {"editkit/__init__.py"}),  # the public names
        ("data/formats", formats.names(), set()),
    ],
)
def test_no_other_file_names_one(folder: str, names: list[str], may: set[str]) -> None:
    """So a new one touches no existing file (a method of ours that shall be `editkit.NAME`: one)."""
    own = {path for path in (PACKAGE / folder).glob("*.py") if path.stem != "__init__"}
    assert {path.stem for path in own} == {*names}
    module = f"editkit.{folder.replace('/', '.')}."
    for path in PACKAGE.rglob("*.py"):
        if path not in own and str(path.relative_to(PACKAGE.parent)) not in may:
            text = path.read_text(encoding="utf-8")
            assert not [name for name in names if f"{module}{name}" in text], path
