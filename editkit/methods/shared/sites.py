"""What passes through the edited modules at the lookup token: the keys and values that an update is computed from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from editkit.facts import Fact
from editkit.methods.shared.engine import AtLookup
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.precision import widened
from editkit.models.products import quick_products
from editkit.models.tokens import tokenise, unflatten
from editkit.nethook import Trace


@torch.no_grad()
@quick_products()
def at_lookup(lm: LanguageModel, site: str, facts: Sequence[Fact], templates: Sequence[str], token: str) -> AtLookup:
    """Input and output of `site` at the lookup token of each fact in each template, [facts, templates, d] each.

    - `site`: a module's name.
    - `templates`: contexts with one `{}` for the prompt.
    - `token`: which token is looked up (lookup.py).

    The pass ends at the site and at the lookup token, since nothing later can change what is read there. A half model
    on the CPU runs in float32.
    """
    asked = [(fact, context.replace("{}", fact.prompt)) for fact in facts for context in templates]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][1]) + len(asked[i][0].subject))
    with widened(lm):
        for begin in range(0, len(order), 64):
            part = order[begin : begin + 64]
            rows = tokenise(lm, [asked[i][0].filled(asked[i][1]) for i in part])
            at = [lookup_position(rows, row, asked[i][1], asked[i][0].subject, token) for row, i in enumerate(part)]
            inputs = {name: value[:, : max(at) + 1] for name, value in rows.inputs().items()}
            with Trace(lm.model, site, inputs=True, outputs=True, stop=True) as trace:
                lm.model(**inputs, use_cache=False)
            index = torch.arange(len(part)), torch.tensor(at)
            both = [unflatten(each, len(part))[index].double().cpu() for each in (trace.input, trace.output)]
            found |= {i: (both[0][row], both[1][row]) for row, i in enumerate(part)}
    shape = (len(facts), len(templates), -1)
    return AtLookup(*(torch.stack([found[i][side] for i in range(len(asked))]).view(shape) for side in (0, 1)))
