"""Train MEND's hypernetwork for a model on the atlas, and measure it on facts it never saw.

    python scripts/train_mend.py                                  # the bundled atlas model; see --minutes
    python scripts/train_mend.py --model FOLDER --out FILE        # resumes by itself after a kill

Each example is one edit: a fact of the atlas with another object of its relation as the new target. The loss is
that of the paper (arXiv 2110.11309, equation 4):

    c_edit · mean NLL(target_new | the prompt and other phrasings) + mean KL(before ‖ after | other facts)

after the edit, where the other facts are those of neighbors and the subject's own other relations. Its gradient flows
through W + ΔW by `torch.func.functional_call`; the model's own weights are not touched. Subjects are held out whole:
no prompt edits or rephrases them in training. Everything a step needs is a function of (seed, step).
"""

import argparse
import json
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm

from editkit import load
from editkit.corpora import Atlas, AtlasFact, load_atlas
from editkit.data.atlas import atlas_case
from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, PORTABILITY, REWRITE, SAME_SUBJECT, UNSEEN, Case
from editkit.facts import Fact
from editkit.files import whole
from editkit.methods.mend import BUNDLED, Mend, MendSettings, mend, rank_one_gradients
from editkit.methods.shared.likelihood import nll_of_rows
from editkit.metrics.scoring import score_probes
from editkit.models.load import LanguageModel
from editkit.models.tokens import encode_with_targets, spaced
from editkit.nethook import get_parameter, requires_grad


@dataclass(frozen=True)
class Recipe:
    """What decides the result, with the model and the atlas."""

    layers: tuple[int, ...] = (3, 4, 5)
    rank: int = 64
    first_lr: float = 0.1  # α of every weight before training
    lr: float = 1e-3  # Adam's, for the network; cosine to a tenth
    lr_lr: float = 1e-2  # Adam's, for log α
    c_edit: float = 0.5
    steps: int = 1500
    edits: int = 8  # a step
    rephrased: int = 2  # other phrasings an edit
    kept: int = 4  # prompts of other facts an edit
    held_out: float = 0.15  # share of the subjects
    warm: int = 100  # edits from which μ and σ are taken
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """One edit, and what is asked after it: (prompt, answer) pairs."""

    fact: Fact
    changed: list[tuple[str, str]]
    kept: list[tuple[str, str]]


def split(atlas: Atlas, recipe: Recipe) -> tuple[list[AtlasFact], list[AtlasFact]]:
    """Facts to train on, and those of the subjects held out."""
    subjects = sorted(atlas.by_subject)
    held = set(random.Random(recipe.seed).sample(subjects, round(recipe.held_out * len(subjects))))
    return [f for f in atlas.facts if f.subject not in held], [f for f in atlas.facts if f.subject in held]


def example(atlas: Atlas, fact: AtlasFact, rng: random.Random, recipe: Recipe) -> Example:
    """An edit of `fact` with a random target and phrasing. Phrasings never seen in training stay unseen here."""
    case = atlas_case(atlas, fact, rng)
    phrasings = [*atlas.trained_pairs(fact), *atlas.held_out_pairs(fact)]
    prompt, *others = rng.sample(phrasings, min(1 + recipe.rephrased, len(phrasings)))
    changed = [(p.format(fact.subject), case.fact.target_new) for p in (prompt, *others)]
    own = [(p.prompt, p.target_true) for p in case.probes if p.kind == SAME_SUBJECT]
    near = [(p.prompt, p.target_true) for p in case.probes if p.kind == NEIGHBORHOOD]
    own = rng.sample(own, min(recipe.kept // 2, len(own)))
    near = rng.sample(near, min(recipe.kept - len(own), len(near)))
    return Example(replace(case.fact, prompt=prompt), changed, own + near)


def losses_after(lm: LanguageModel, network: Mend, each: Example) -> tuple[Tensor, Tensor]:
    """(edit loss, locality KL) of the model with the network's ΔW for one edit, differentiable in the network."""
    pairs, _ = rank_one_gradients(lm, network.sites, [each.fact])
    changed = {}
    for site, (k, g) in pairs.items():
        left, right = network(site, k, g)
        weight = get_parameter(lm.model, f"{site}.weight")
        delta = left @ right
        changed[f"{site}.weight"] = weight + (delta if weight.shape == delta.shape else delta.T).to(weight.dtype)
    asked = [*each.changed, *each.kept]
    scored = encode_with_targets(lm, [prompt for prompt, _ in asked], [spaced(answer) for _, answer in asked])
    inputs = scored.rows.inputs() | {"use_cache": False}
    row, at, _ = scored.pick()
    kept = row >= len(each.changed)  # of the scored tokens
    row, at = row[kept], at[kept]
    with torch.no_grad():
        before = log_softmax(lm.model(**inputs).logits[row, at], -1)
    logits = functional_call(lm.model, changed, kwargs=inputs).logits
    locality = kl_div(log_softmax(logits[row, at], -1), before, log_target=True, reduction="sum") / max(1, len(row))
    return nll_of_rows(logits, scored)[: len(each.changed)].mean(), locality


def train(lm: LanguageModel, recipe: Recipe, checkpoint: Path, every: int = 25) -> Mend:
    """The trained network. Resumes from `checkpoint` where there is one of the same recipe and base."""
    atlas = load_atlas()
    facts, _ = split(atlas, recipe)
    network = Mend.for_model(lm, recipe.layers, rank=recipe.rank, lr=recipe.first_lr, seed=recipe.seed)
    rng = random.Random(f"{recipe.seed}:warm")
    drawn = [example(atlas, fact, rng, recipe).fact for fact in rng.sample(facts, min(recipe.warm, len(facts)))]
    network.normalise_by([rank_one_gradients(lm, network.sites, [fact])[0] for fact in drawn])
    network.to(lm.device)
    rest = [p for name, p in network.named_parameters() if name != "log_lr"]
    optimizer = torch.optim.Adam([{"params": rest, "lr": recipe.lr}, {"params": [network.log_lr], "lr": recipe.lr_lr}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps, recipe.lr / 10)

    first, identity = 0, {"recipe": {**asdict(recipe), "layers": list(recipe.layers)}, "base": network.base}
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=lm.device, weights_only=True)
        if state["identity"] != identity:
            raise SystemExit(f"{checkpoint} is of another recipe or model: use another --out, or delete it.")
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
        print(f"resumed at step {first} from {checkpoint}")

    shown: dict[str, list[float]] = defaultdict(list)
    with requires_grad(lm.model, only=[]):
        bar = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc="MEND", mininterval=5)
        for step in bar:
            rng = random.Random(f"{recipe.seed}:{step}")
            for fact in rng.sample(facts, recipe.edits):
                edit, locality = losses_after(lm, network, example(atlas, fact, rng, recipe))
                ((recipe.c_edit * edit + locality) / recipe.edits).backward()
                shown["edit"].append(edit.item())
                shown["locality"].append(locality.item())
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                state = {"identity": identity, "step": step + 1, "network": network.state_dict()}
                state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                with whole(checkpoint) as temporary:
                    torch.save(state, temporary)
                means = "  ".join(f"{name} {sum(v) / len(v):.3f}" for name, v in shown.items())
                alphas = " ".join(f"{x:.3g}" for x in network.log_lr.exp().tolist())
                tqdm.write(f"step {step + 1}  {means}  α {alphas}")
                shown.clear()
    return network


def measure(lm: LanguageModel, path: Path, cases: list[Case]) -> dict[str, tuple[float, int]]:
    """Shares over the probes of `cases`, one edit each, restored and verified between: (value, probes)."""
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for case in tqdm(cases, desc="held-out edits", mininterval=2):
        before = score_probes(lm, case.probes)
        edit = mend(lm, case.fact, MendSettings(str(path)))
        with edit.applied(lm):
            after = score_probes(lm, case.probes)
        for was, now in zip(before, after, strict=True):
            kind = now.probe.kind
            if kind in (REWRITE, PARAPHRASE, UNSEEN, PORTABILITY):
                outcomes[f"{kind}: new wins"].append(now.new_wins)
            elif kind == NEIGHBORHOOD:
                outcomes[f"{kind}: true wins"].append(now.true_wins)
                outcomes[f"{kind}: true won before"].append(was.true_wins)
            elif was.true is not None and now.true is not None and was.true.greedy:
                outcomes[f"{kind}: still said"].append(now.true.greedy)
            if kind == REWRITE:
                outcomes[f"{kind}: new is said"].append(now.new.greedy)
    return {name: (sum(v) / len(v), len(v)) for name, v in sorted(outcomes.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="atlas", help="a bundled model, a folder, or a name on the Hub")
    parser.add_argument("--out", type=Path, default=None, help="default: the bundled file of this model")
    parser.add_argument("--layers", default=",".join(map(str, Recipe.layers)), help="blocks, comma-separated")
    parser.add_argument("--n", type=int, default=200, help="held-out facts measured; 0 measures none")
    for name in ("rank", "steps", "edits", "kept", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Recipe, name))
    for name in ("first_lr", "lr", "lr_lr", "c_edit"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Recipe, name))
    options = vars(parser.parse_args())

    began, lm = time.time(), load(options["model"])
    out = options["out"] or BUNDLED / f"{options['model']}_mend.safetensors"
    fields: dict[str, Any] = {name: value for name, value in options.items() if name in Recipe.__dataclass_fields__}
    fields["layers"] = tuple(int(x) for x in options["layers"].split(","))
    recipe = Recipe(**fields)
    checkpoint = out.with_suffix(".checkpoint.pt")
    network = train(lm, recipe, checkpoint)
    network.save(out)
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB, {time.time() - began:.0f} s")
    if options["n"]:
        atlas = load_atlas()
        rng = random.Random(recipe.seed)
        facts = split(atlas, recipe)[1]
        cases = [atlas_case(atlas, f, rng) for f in rng.sample(facts, min(options["n"], len(facts)))]
        found = measure(lm, out, cases)
        for name, (value, count) in found.items():
            print(f"{name:32} {value:.3f}   n {count}")
        print(json.dumps({"recipe": asdict(recipe), "held out": found}))


if __name__ == "__main__":
    main()
