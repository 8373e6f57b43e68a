"""LocFT-BF: fine-tuning of one weight, breadth first (2025, arXiv 2509.22072).

    min over ΔW of   mean over all target tokens of the batch of  −log p(token | prompt, target before it)

What differs from FT (ft.py): every pass goes over *all* facts, in shuffled mini-batches of 100, so that no fact is
trained to the end before another begins; the mean is over tokens, not facts; and the end-of-text token belongs to the
target, so that a free answer stops. A batch under a loss of .01 takes no step, and a pass under it is the last.

In a session facts of earlier steps are trained along with the new ones (`method.replay`), as many as one mini-batch
by default, drawn anew at each step, so that a step does not cost more as the session grows. A prompt that has been
edited again has its last answer. The steps hold their facts themselves (Edit.provenance): they are saved with the
session, and undone with it. Of steps that are folded the last answers are kept.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from editkit.edits import Edit, base_of, dense_delta
from editkit.errors import FactError
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.ft import FtSettings, trainable, tuned
from editkit.methods.rome import CONSTANTS as ROME
from editkit.methods.shared.carried import Carried, json_form
from editkit.methods.shared.likelihood import descend, kept_grads, mean_of_tokens, targets_after_prompts
from editkit.methods.shared.prelude import checked_facts, provenance
from editkit.models.architecture import as_matrix, experts_in, orientation, weight_name
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.models.offload import require_trainable
from editkit.models.snapshot import Snapshot
from editkit.models.tokens import Scored, encode_with_targets, spaced
from editkit.models.wrapped import require_all_editable
from editkit.nethook import get_module, get_parameter, requires_grad
from editkit.settings import Constants, require


@dataclass(frozen=True)
class FtBfSettings(FtSettings):
    """LocFT-BF (arXiv 2509.22072)."""

    constants: ClassVar[Constants] = Constants(
        {"lr": 5e-4},
        {
            "atlas": {"lr": 3e-3},  # 25 passes over three facts end at a loss of .01; at 1e-3, FT's, at 2.6
            "Llama-3-8B": {"layer": 22},  # of the Instruct version, as Qwen's
            "Qwen2.5-7B": {"layer": 6},
        },
        blocks="layer",
        like=ROME,
    )

    batch: int = 100  # facts a step of Adam
    replay: int = 100  # facts of earlier steps of a session that are trained along; 0: none
    end_of_text: bool = True  # train the end-of-text token after the target

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.replay >= 0, "method.replay", self.replay, "0 or more")


@dataclass(frozen=True)
class Stored:
    """What a session has edited before: how many steps, and the last fact of each prompt."""

    steps: int = 0
    facts: dict[str, Fact] = field(default_factory=dict)

    def also(self, edit: Edit) -> "Stored":
        """With the facts of one step more."""
        found = [Fact(**each) for each in edit.provenance["facts"]]
        return Stored(self.steps + 1, self.facts | {fact.text: fact for fact in found})


STORED = json_form(
    lambda found: Stored(found["steps"], {fact.text: fact for fact in (Fact(**each) for each in found["facts"])}),
    lambda stored: {"steps": stored.steps, "facts": [asdict(fact) for fact in stored.facts.values()]},
)


@in_eval_mode
def ft_bf(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: FtBfSettings | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
    earlier: Sequence[Edit] = (),
    carried: Carried | None = None,
) -> Edit:
    """Fine-tune one weight on all of `facts`; the dense ΔW as an Edit.

    - `settings`: see FtBfSettings; None for a field takes the model's constant.
    - `seed`: of the order of each pass, and of what is replayed.
    - `progress`: show a bar with the loss of each pass.
    - `earlier`: this method's edits that `lm` already holds, whose facts may be replayed.
    - `carried`: what a session has computed from them.

    The model is left bit for bit as it was, its flags and `.grad` too. Raises ModelError for a layer it does not
    have, FactError for a target without tokens, EditkitError for a loss or an update that is not finite.
    """
    found = checked_facts(lm, facts)
    settings = (settings or FtBfSettings()).resolved(lm.name, lm.layers)
    assert settings.layer is not None and settings.lr is not None  # resolved
    site = down_of(lm, lm.check_layer(settings.layer))
    require_all_editable(lm.model, [site])
    require_trainable(lm.model, site, "ft_bf")
    holder, base = get_module(lm.model, site), base_of(lm)
    layout, name = orientation(holder, site), weight_name(site, experts_in(holder))
    before = (carried or Carried()).state("facts", earlier, Stored, Stored.also, STORED)
    stored = replayed(found, before, settings.replay, seed)
    every = [*found, *stored]
    batches = shuffled(lm, every, settings.batch, seed, end_of_text=settings.end_of_text)
    with (
        Snapshot.take(lm.model, [name]),
        trainable(lm, site, name) as trained,
        kept_grads(lm.model),
        requires_grad(lm.model, only=[trained]),
        tuned(get_parameter(lm.model, trained), settings.lr) as delta,
    ):
        steps = descend(lm, every, settings, progress=progress, batches=batches, loss_of=mean_of_tokens)
    report: dict[str, Any] = {"steps": steps, "largest": delta.abs().max().item(), "replayed": len(stored)}
    how = provenance("ft_bf", settings, found, seed=seed, reports=[report])
    return Edit((dense_delta(lm, site, as_matrix(delta, layout)),), base, how)


def shuffled(
    lm: LanguageModel, facts: Sequence[Fact], batch: int, seed: int, *, end_of_text: bool
) -> Callable[[], list[Scored]]:
    """A function that gives the mini-batches of the next pass over all `facts`, each time in another order.

    - `batch`: facts in each. `seed`: of the orders.
    - `end_of_text`: score the end-of-text token behind the target too.
    """
    order = torch.Generator().manual_seed(seed)
    rows = with_end if end_of_text else targets_after_prompts

    def batches() -> list[Scored]:
        drawn = [facts[i] for i in torch.randperm(len(facts), generator=order).tolist()]
        return [rows(lm, drawn[i : i + batch]) for i in range(0, len(drawn), batch)]

    return batches


def replayed(facts: Sequence[Fact], before: Stored, count: int, seed: int) -> list[Fact]:
    """`count` facts of `before`, drawn by `seed` and the number of its steps, without the prompts of `facts`."""
    now = {fact.text for fact in facts}
    stored = [fact for prompt, fact in before.facts.items() if prompt not in now]
    return random.Random(f"{seed} {before.steps}").sample(stored, min(count, len(stored)))


def with_end(lm: LanguageModel, facts: Sequence[Fact]) -> Scored:
    """Rows of prompt + target_new + end-of-text token, all but the prompt scored. Raises FactError where the tokenizer
    cannot write that token."""
    end = lm.tokenizer.eos_token
    if end is None:
        raise FactError(f"The tokenizer of '{lm.name}' has no end-of-text token. Set method.end_of_text=false.")
    targets = [spaced(fact.target_new) + str(end) for fact in facts]
    scored = encode_with_targets(lm, [fact.text for fact in facts], targets)
    for row, positions in enumerate(scored.positions):
        if int(scored.rows.ids[row, positions[-1]]) != lm.tokenizer.eos_token_id:
            raise FactError(
                f"The tokenizer of '{lm.name}' does not read {end!r} in a text as its end-of-text token. Set "
                "method.end_of_text=false."
            )
    return scored


register("ft_bf", ft_bf, FtBfSettings)
