"""The checks of a model family: that the hook layer, replay and an edit mean there what they mean elsewhere.

- named: each block and its down-projection are there, and the weight is W [d_model, d_ff] in the papers' orientation;
- captured: the output of a down-projection is W k + b for the captured key k;
- replayed: from any block on, given the stream that enters it, the logits are those of the whole model;
- edited: an R-ROME edit keeps what `check_method` asks of a method.

Of a mixture of experts, whose blocks have no single down-projection, the second is left out.
"""

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editkit.methods import get_method
from editkit.models.architecture import architecture_of, as_matrix, orientation
from editkit.models.head import logits_of
from editkit.models.load import LanguageModel
from editkit.models.replay import replay
from editkit.models.tokens import tokenise
from editkit.nethook import Trace, get_module
from editkit.settings import ContextSettings
from editkit.testing.conformance import Conformance
from editkit.testing.of_method import FACTS, check_cell

TEXTS = ["The Eiffel Tower is in Paris", "Rain", "The capital of the country France is the city of"]
TOLERANCE = 1e-3  # of logits in float32, with those of random weights at about 1
# Random weights have small values: little decay, and a large step.
CONTEXTS = ContextSettings(counts=(2,), lengths=(5,))
QUICK: dict[str, Any] = {
    "layer": 1,
    "steps": 15,
    "lr": 0.3,
    "weight_decay": 1e-3,
    "clamp": 4.0,
    "stop_loss": 0.0,
    "contexts": CONTEXTS,
}


def check_family(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Conformance:
    """Run all checks of the family of `model`, a small one with random weights and three blocks or more.

    Its `Architecture` must be registered (`editkit.models.architecture.register`). Raises ModelError without one.
    """
    family = model.config.model_type
    lm = LanguageModel(f"tiny-{family}", model, tokenizer, architecture_of(family))
    found = Conformance(f"family '{family}'")
    if found.run("named", family, lambda: _named(lm)):
        if lm.architecture.experts is None:
            found.run("captured", family, lambda: _captured(lm))
        for start in range(lm.layers):
            found.run("replayed", f"{family}, from block {start}", partial(_replayed, lm, start))
        method = get_method("r_rome")
        check_cell(found, family, lm, method, method.settings(**QUICK), list(FACTS[:1]))
    return found


def _named(lm: LanguageModel) -> None:
    for layer in range(lm.layers):
        get_module(lm.model, lm.architecture.block.format(layer))
        get_module(lm.model, lm.architecture.attention.format(layer))
        if lm.architecture.experts is not None:
            continue
        name = lm.architecture.down(layer)
        module = get_module(lm.model, name)
        weight = as_matrix(module.get_parameter("weight"), orientation(module, name))
        width = lm.model.get_input_embeddings().get_parameter("weight").shape[1]
        assert weight.shape[0] == width, f"W of {name} is {list(weight.shape)}, and d_model is {width}"
    get_module(lm.model, lm.architecture.final_norm)


def _captured(lm: LanguageModel) -> None:
    rows = tokenise(lm, TEXTS[:1])
    for layer in range(lm.layers):
        name = lm.architecture.down(layer)
        with torch.no_grad(), Trace(lm.model, name, inputs=True) as trace:
            lm.model(**rows.inputs(), use_cache=False)
        module = get_module(lm.model, name)
        weight = as_matrix(module.get_parameter("weight"), orientation(module, name))
        bias = getattr(module, "bias", None)
        wanted = trace.input @ weight.T + (0 if bias is None else bias)
        apart = float((trace.output - wanted).abs().max())
        assert apart <= TOLERANCE, f"the output of {name} is {apart:.1e} away from W k + b"


def _replayed(lm: LanguageModel, start: int) -> None:
    rows = tokenise(lm, TEXTS)
    last = [rows.last(row) for row in range(len(TEXTS))]
    first = [max(0, end - 2) for end in last]
    with torch.no_grad():
        wanted = lm.model(**rows.inputs(), use_cache=False).logits
        ready = replay(lm, rows, first, last, start)
        found = logits_of(lm, ready.run(ready.stream))
    for row, (begin, end) in enumerate(zip(first, last, strict=True)):
        apart = float((found[row, : end - begin + 1] - wanted[row, begin : end + 1]).abs().max())
        assert apart <= TOLERANCE * float(wanted.abs().max()), f"the logits of {TEXTS[row]!r} are {apart:.1e} apart"
