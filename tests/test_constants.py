"""Published constants: every name resolves to what the table says, within the model's depth, under all its names."""

from typing import Any

import pytest

from editkit import methods
from editkit.methods.alphaedit import AlphaEditSettings
from editkit.methods.memit import MemitSettings
from editkit.methods.rome import RomeSettings
from editkit.settings import MethodSettings
from editkit.settings.constants import _ALIASES

# Blocks of each model with published constants, by its config.json on the Hub.
DEPTH = {
    "atlas": 8,
    "gpt2-medium": 24,
    "gpt2-large": 36,
    "gpt2-xl": 48,
    "gpt-j-6b": 28,
    "gpt-neox-20b": 44,
    "Llama-3-8B": 32,
    "Llama-2-7B": 32,
    "Llama-3.2-3B": 28,
    "Qwen2.5-7B": 28,
    "Mistral-7B-v0.3": 32,
}


def published() -> list[tuple[str, str]]:
    """(method, model) for each entry of each method's table."""
    return [
        (method, model)
        for method in methods.names()
        for model in methods.get_method(method).settings.constants.published
    ]


def settings_of(method: str) -> MethodSettings:
    settings: MethodSettings = methods.get_method(method).settings()
    return settings


@pytest.mark.parametrize(("method", "model"), published())
def test_each_published_name_resolves_within_the_models_depth(method: str, model: str) -> None:
    said = settings_of(method).constants.published[model]
    names = [model, f"someone/{model}", *(f"org/{alias}" for alias, of in _ALIASES.items() if of == model)]
    for name in names:
        found = settings_of(method).constants.of(name, DEPTH[model])
        assert {key: found[key] for key in said} == said
        resolved = settings_of(method).resolved(name, DEPTH[model])
        assert all(0 <= block < DEPTH[model] for block in resolved.blocks)
        assert bool(resolved.blocks) == bool(resolved.constants.blocks or "layer" in said or "layers" in said)


def test_constants_that_do_not_fit_are_named() -> None:
    with pytest.warns(UserWarning, match="'gpt2-xl' are for block 17, and this model has 3 blocks"):
        found = RomeSettings().constants.of("gpt2-xl", 3)
    assert found == RomeSettings().constants.of("no such name", 3)


def test_each_alias_is_of_a_model_with_constants() -> None:
    assert set(_ALIASES.values()) <= {model for _, model in published()}


EASYEDITS = {"lr": 0.5, "weight_decay": 1e-3, "clamp": 4.0, "steps": 25}


@pytest.mark.parametrize(
    ("settings", "model", "wanted"),
    [
        (RomeSettings(), "Qwen/Qwen2.5-7B", {"layer": 5} | EASYEDITS),
        (RomeSettings(), "meta-llama/Llama-2-7b-hf", {"layer": 5} | EASYEDITS),
        (RomeSettings(), "meta-llama/Llama-3.2-3B", {"layer": 5} | EASYEDITS),
        (
            MemitSettings(),
            "Qwen/Qwen2.5-7B-Instruct",
            {"layers": [4, 5, 6, 7, 8], "mom2_update_weight": 15e3} | EASYEDITS,
        ),
        (MemitSettings(), "meta-llama/Llama-2-7b-hf", {"layers": [4, 5, 6, 7, 8]} | EASYEDITS),
        (MemitSettings(), "meta-llama/Llama-3.2-3B", {"layers": [2, 3, 4, 5, 6]} | EASYEDITS),
        (AlphaEditSettings(), "Qwen/Qwen2.5-7B", {"layers": [4, 5, 6, 7, 8], "l2": 1.0} | EASYEDITS),
        (AlphaEditSettings(), "meta-llama/Meta-Llama-3-8B-Instruct", {"l2": 10.0, "lr": 0.1, "clamp": 0.75}),
        (AlphaEditSettings(), "meta-llama/Llama-3.2-3B", {"layers": [2, 3, 4, 5, 6], "l2": 10.0} | EASYEDITS),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_constants_that_public_tools_agree_on(settings: MethodSettings, model: str, wanted: dict[str, Any]) -> None:
    resolved = settings.resolved(model, 28 if "3B" in model or "Qwen" in model else 32)
    assert {name: getattr(resolved, name) for name in wanted} == wanted
