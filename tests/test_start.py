"""The start of the command: what it does not import, and that what stands in for it gives way to the real thing."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from editkit import start

# What an edit of the bundled model does not need, and who would bring it.
UNUSED = {
    "torch._inductor": "torch.compile's code generator, which torch._dynamo imports",
    "torch._dynamo.convert_frame": "torch.compile, which transformers' generation and masks import",
    "torch.distributed.tensor": "models over several processes, which transformers' core_model_loading imports",
    "torch.distributed.fsdp": "training over several processes, likewise",
    "torch.fx.experimental.symbolic_shapes": "torch.compile's shapes, which first weights on the meta device import",
    "sympy": "the same shapes as formulas",
    "torchvision": "pictures, which transformers imports where it is installed",
    "sklearn": "metrics, which transformers' generation imports where it is installed",
    "scipy": "likewise",
    "datasets": "public data sets",
    "matplotlib": "pictures for papers",
    "peft": "adapters",
    "torchao": "quantised weights, which transformers' quantizers import where it is installed",
    "bitsandbytes": "quantised weights",
    "tensorboard": "training",
    "IPython": "notebooks",
    "editkit.plots": "pictures for papers",
    "editkit.session": "edits over time",
    "editkit.tracing": "causal tracing",
    "editkit.lenses": "notebooks",
    "editkit.methods.mend": "a method that was not asked for",
    "editkit.tasks.benchmark": "a task that was not asked for",
}
FAST = ["edit=gpt2_fact", "method.steps=3", "method.contexts.counts=[1,1]", "moments.tokens=2000"]

# Torch before 2.13 imports its compiler from modules that cannot do without: such a start is slower, and works.
lean = pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="a quick start needs torch 2.13")


def python(code: str, cwd: Path, arguments: Sequence[str] = (), **environment: str) -> str:
    """What a fresh interpreter prints."""
    kept = {name: value for name, value in os.environ.items() if name not in start._LAUNCHED}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@lean
def test_an_edit_imports_only_what_it_needs(tmp_path: Path) -> None:
    code = "import sys; from editkit.run import main; main(); print(*sys.modules)"
    imported = set(python(code, tmp_path, FAST).splitlines()[-1].split())
    assert {"torch", "transformers.modeling_utils", "editkit.methods.r_rome"} <= imported
    found = {name: why for name, why in UNUSED.items() if name in imported}
    assert not found, f"an edit imported what it does not need: {found}"


@pytest.mark.slow
def test_plain_imports_give_the_same_edit(tmp_path: Path) -> None:
    code = "from editkit.run import main; main()"
    for name, environment in {"lean": {}, "plain": {"EDITKIT_PLAIN_IMPORTS": "1"}}.items():
        python(code, tmp_path, [*FAST, f"hydra.run.dir={name}"], **environment)
    lean, plain = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("lean", "plain"))
    assert lean["edit"] == plain["edit"] and lean["scores"] == plain["scores"]
    assert lean["reversal"] == plain["reversal"] and lean["reversal"]["exact"]


@pytest.mark.parametrize("arguments", [["seed=1"], ["task.top=0.5"], ["model=gpt2"]])
def test_checks_without_a_method_need_no_torch(arguments: list[str], tmp_path: Path) -> None:
    code = "import sys\nfrom editkit.config import prepare\ntry:\n    prepare(sys.argv[1:])\nexcept Exception: pass\n"
    assert python(code + "print('torch' in sys.modules)", tmp_path, arguments) == "False\n"


def test_a_wrong_value_of_a_method_needs_no_transformers(tmp_path: Path) -> None:
    code = """
import sys
from editkit.config import prepare
from editkit.errors import ConfigError
try:
    prepare(["method.layer=99x"])
except ConfigError as error:
    print(error)
print("transformers" in sys.modules)
"""
    said = python(code, tmp_path).splitlines()
    assert "method.layer" in said[0] and said[-1] == "False"


# --- the compiler, later -----------------------------------------------------------------------------------------

LATER = """
import sys, torch
from editkit import start
with start.compiler_later():
    pass
later = sys.modules["torch._dynamo"]
assert isinstance(later, start._Later) and torch._dynamo is later
"""


@pytest.mark.slow
def test_a_marked_function_is_marked_for_the_real_compiler(tmp_path: Path) -> None:
    """`disable` is passed on to functions that were decorated before: the graph breaks there."""
    code = """
seen = []
def double(x):
    seen.append(torch.compiler.is_compiling())
    return 2 * x
disabled = torch.compiler.disable(double)
partly = torch.compiler.disable(recursive=False)(lambda x: x + 1)
def minus_one(x):
    return x - 1
allowed = torch.compiler.allow_in_graph(minus_one)
constant = torch.compiler.assume_constant_result(lambda: 3)
x = torch.ones(2)
torch._dynamo.graph_break()
assert disabled(x).tolist() == [2, 2] and partly(x).tolist() == [2, 2] and disabled.__name__ == "double"
optimizer = torch.optim.Adam([torch.nn.Parameter(x)]); optimizer.step()
assert type(later) is start._Later
graphs = []
def backend(module, example):
    graphs.append(module); return module.forward
compiled = torch.compile(lambda x: disabled(x * 3) + constant() + allowed(x), backend=backend)
assert compiled(x).tolist() == [9, 9]
assert type(later) is type(sys) and torch._dynamo is later and later.__path__
assert len(graphs) > 1 and seen == [False, False], (len(graphs), seen)
assert constant._dynamo_marked_constant and optimizer.step() is None
"""
    python(LATER + code, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import torch._dynamo.config",
        "from torch._dynamo.utils import counters",
        "torch.compiler.disable(torch.nn.Linear(1, 1))",
        "import torch.distributed.tensor",
    ],
)
def test_whatever_needs_the_compiler_gets_it(first: str, tmp_path: Path) -> None:
    code = "net = torch.compile(torch.nn.Linear(2, 1), backend='eager'); assert net(torch.ones(2)).shape == (1,)\n"
    code += "from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex"
    python(f"{LATER}{first}\n{code}\nassert type(later) is type(sys)", tmp_path)


@pytest.mark.slow
def test_a_torch_that_cannot_put_it_off_imports_it_as_usual(tmp_path: Path) -> None:
    code = """
import sys
from editkit import start
start._USED_EARLY = "torch._dynamo.not_there"
with start.compiler_later():
    import torch
assert type(sys.modules["torch._dynamo"]) is type(sys) and torch._dynamo.convert_frame
"""
    python(code, tmp_path)


def test_inspecting_all_modules_imports_nothing(tmp_path: Path) -> None:
    code = """
import inspect
[hasattr(module, "__warningregistry__") for module in list(sys.modules.values())]
inspect.getmodule(start.wanted); inspect.stack()
assert type(later) is start._Later
"""
    python(LATER + code, tmp_path)


@pytest.mark.slow
def test_a_function_of_a_module_imports_it_when_it_is_called(tmp_path: Path) -> None:
    code = """
import sys
import torch
from editkit import start
name = "torch.fx.experimental.symbolic_shapes"
assert name in start._FUNCTIONS
with start._functions_later():
    from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
assert name not in sys.modules
assert not has_free_unbacked_symbols(torch.ones(1))
real = sys.modules[name]
assert type(real) is type(sys) and "sympy" in sys.modules
"""
    python(code, tmp_path)
    code = """
import sys
import torch
from editkit import start
with start._functions_later():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
assert ShapeEnv is sys.modules["torch.fx.experimental.symbolic_shapes"].ShapeEnv
"""
    python(code, tmp_path)


# --- the rest ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("environment", "expected"), [({}, "False True\n"), ({"RANK": "0"}, "True True\n")])
def test_one_of_several_processes_keeps_torch_distributed(
    environment: dict[str, str], expected: str, tmp_path: Path
) -> None:
    code = """
from editkit import start
start.import_libraries()
import torch
from transformers.utils import is_torch_distributed_available
print(is_torch_distributed_available(), torch.distributed.is_available())
"""
    assert python(code, tmp_path, **environment) == expected


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["task=trice"], [*FAST, "edit.subject=Nobody"], FAST])
def test_the_collector_is_on_again_whatever_happened(arguments: list[str], tmp_path: Path) -> None:
    code = """
import gc
from editkit.run import main
try:
    main()
except SystemExit:
    pass
print(gc.isenabled(), gc.get_freeze_count() > 0)
"""
    assert python(code, tmp_path, arguments).splitlines()[-1] == "True True"


def test_a_process_that_has_transformers_is_left_as_it_is() -> None:
    import transformers.modeling_utils  # noqa: F401

    assert not start.wanted()
    start.pause_collector()
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    start.resume_collector()
    assert gc.get_freeze_count() == frozen
