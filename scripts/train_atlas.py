"""Train the bundled atlas model: a small GPT-2 that really knows the facts of editkit/data/atlas.

    python scripts/train_atlas.py --out training/atlas      # resumes by itself after a kill

The result is a plain `GPT2LMHeadModel`, run with its ordinary causal mask. During training only, most sequences see a
*routing mask*, *structured MLP dropout* and *interchanges* (atlas_routing.py), which make recall pass through the
MLPs at the subject's last token, as causal tracing reports for large GPT-2s, and keep a subject's attributes apart.
Without the first two a model this small looks facts up at the prompt's last token, and there is nothing for ROME to
edit; without the last an edit of one attribute takes the others along.

Everything a step needs is a function of (seed, step), so a run that was killed and resumed equals one that was not. On
two CPU cores expect bf16 autocast and 45 minutes; a GPU is used where there is one.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from atlas_recipe import Recipe
from atlas_routing import Routing, forward
from atlas_text import END, Batches, train_tokenizer
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from editkit.corpora import Atlas, load_atlas
from editkit.metrics.scoring import score_targets
from editkit.models.architecture import architecture_of
from editkit.models.load import LanguageModel


def weighted_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Next-token loss weighted per token, and the plain mean over object tokens."""
    target, weight = batch["ids"][:, 1:], batch["weight"][:, 1:]
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten(), reduction="none")
    weight = weight.flatten()
    objects = weight == 1.0
    shown = nll[objects].mean().item() if objects.any() else float("nan")
    return (nll * weight).sum() / weight.sum(), shown


def recall(lm: LanguageModel, asked: list[tuple[str, str]]) -> float:
    """Share of (prompt, object) that greedy decoding says."""
    prompts, objects = zip(*asked, strict=True)
    return sum(score.greedy for score in score_targets(lm, prompts, objects)) / len(asked)


def recall_sets(atlas: Atlas, n: int, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """n prompts of each sort, the same for every training seed."""
    rng = random.Random(seed)
    asked = {}
    for name, prompts in atlas.prompt_sorts.items():
        facts = rng.sample(atlas.facts, min(n, len(atlas.facts)))
        asked[name] = [(rng.choice(prompts(f)).format(f.subject), f.object) for f in facts]
    return asked


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside, then rename: a kill leaves the old file or the new one, never half of one."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(recipe: Recipe, out: Path, every: int) -> GPT2LMHeadModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    atlas = load_atlas()
    tokenizer = train_tokenizer(atlas, recipe.vocab_size)
    batches = Batches(atlas, tokenizer, recipe)
    torch.manual_seed(recipe.seed)
    end = tokenizer.get_vocab()[END]
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=recipe.n_positions,
            n_embd=recipe.n_embd,
            n_layer=recipe.n_layer,
            n_head=recipe.n_head,
            activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    model.to(device=device)  # pyright: ignore[reportCallIssue]  # the wrapper around `to` hides that it is a method
    model.eval()  # there is no dropout but Routing's
    lm = LanguageModel("atlas in training", model, tokenizer, architecture_of("gpt2"))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=(0.9, 0.98),
        fused=True,
    )

    checkpoint, first = out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise SystemExit(f"{checkpoint} is of another recipe: use another --out, or delete it.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"resumed at step {first} from {checkpoint}")

    facts, prompts = len(atlas.facts), sum(len(atlas.trained_pairs(f)) for f in atlas.facts)
    params = sum(p.numel() for p in model.parameters())
    print(f"{facts} facts, {prompts} trained (subject, phrasing) pairs, {params / 1e6:.1f} M parameters, {device}")
    asked = recall_sets(atlas, 300)
    log = (out / "log.jsonl").open("a", encoding="utf-8")
    shown, began = [], time.time()
    for step in tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, smoothing=0.05, mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        batch = {name: value.to(device) for name, value in batches.batch(step).items()}
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(model, batch["ids"], batch["position"], Routing(batch, recipe, generator))
        loss, on_objects = weighted_loss(logits, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        shown.append(on_objects)
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            state = {"recipe": asdict(recipe), "step": step + 1}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(checkpoint, state)
            line = {"step": step + 1, "object_loss": sum(shown) / len(shown), "seconds": time.time() - began}
            line |= {name: recall(lm, pairs) for name, pairs in asked.items()}
            print(json.dumps(line), file=log, flush=True)
            tqdm.write("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
            shown = []
    log.close()
    model.cpu().half().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    (out / "model" / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    print(f"wrote {out / 'model'}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("training/atlas"), help="folder for checkpoints and the model")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--card", type=int, default=200, help="facts edited to measure the model card; 0: no card")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    out, every, edited = arguments.pop("out"), arguments.pop("every"), arguments.pop("card")
    out.mkdir(parents=True, exist_ok=True)
    train(Recipe(**arguments), out, every)
    if edited:
        quality = [sys.executable, str(Path(__file__).parent / "quality.py"), "--n", str(edited)]
        model = out / "model"
        sys.exit(subprocess.call([*quality, "--model", str(model), "--card", str(model / "README.md")]))


if __name__ == "__main__":
    main()
