"""Train the bundled atlas model: a small GPT-2 that really knows the facts of editkit/data/atlas.

    python scripts/train_atlas.py --out training/atlas        # resumes by itself after a kill

The result is a plain `GPT2LMHeadModel`, run with its ordinary causal mask. During training only, most
sequences see a *routing mask* and *structured MLP dropout* (`Routing`), which make recall pass through the
MLPs at the subject's last token, as causal tracing reports for large GPT-2s. Without them a model this
small looks facts up at the prompt's last token, and there is nothing for ROME to edit.

Everything a step needs is a function of (seed, step), so a run that was killed and resumed equals one that
was not. On two CPU cores expect bf16 autocast and about half an hour; a GPU is used where there is one.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from editkit.corpora import Atlas, AtlasFact, atlas_prose, load_atlas
from editkit.metrics.counterfact import score_targets
from editkit.models.architecture import architecture_of
from editkit.models.load import LanguageModel

END = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Every setting of the training; the model card prints it."""

    seed: int = 0
    vocab_size: int = 1024  # small on purpose: subjects are several pieces, so identity has to be composed
    n_layer: int = 8
    n_embd: int = 192
    n_head: int = 8
    n_positions: int = 256
    steps: int = 8_000
    sequences: int = 8  # a step
    length: int = 96  # tokens a sequence
    lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.1
    routed: float = 0.9  # share of sequences under the routing mask and the dropout
    extract_from: int = 5  # first layer in which other tokens may read a subject
    drop_first_mlp: float = 0.5  # layer 0's MLP at subject tokens, share of routed sequences
    drop_late_mlps: float = 0.7  # MLPs from `extract_from` on at non-subject tokens, share, drawn per layer
    invented: float = 0.25  # share of sentences about invented subjects (see `invent`)
    inventions: float = 0.4  # invented subjects, as a share of the real ones
    prose: float = 0.08  # share of sequences that are running prose
    shifted: float = 0.25  # share of sequences that start at a random position
    weight_prompt: float = 0.15
    weight_stop: float = 0.3
    weight_prose: float = 0.5


# --- text -----------------------------------------------------------------------------------------------------


def train_tokenizer(atlas: Atlas, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the atlas' sentences and prose, with GPT-2's pre-tokenisation."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f" {p.format(f.subject)} {f.object}." for f in atlas.facts for p in atlas.trained_pairs(f)]
    bpe.train_from_iterator(texts + atlas_prose(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True)
class Sentence:
    """A tokenised sentence. `mention` marks subject tokens, `weight` is each token's share of the loss."""

    ids: list[int]
    mention: list[bool]
    weight: list[float]


def tokenise(tokenizer, phrasing: str, fact: AtlasFact, space: bool, recipe: Recipe) -> Sentence:
    lead = (" " if space else "") + phrasing.split("{}")[0]
    prompt = (" " if space else "") + phrasing.format(fact.subject)
    text = f"{prompt} {fact.object}."
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    begin, end, stop = len(lead), len(lead) + len(fact.subject), len(text) - 1
    mention, weight = [], []
    for left, right in encoded["offset_mapping"]:
        mention.append(right > begin and left < end)
        if left >= stop:
            weight.append(recipe.weight_stop)
        else:
            weight.append(1.0 if left >= len(prompt) else recipe.weight_prompt)
    return Sentence(encoded["input_ids"], mention, weight)


# fmt: off
_SYLLABLES = [
    "bal", "cor", "dan", "fel", "gor", "hin", "jas", "kel", "lom", "mar", "nor", "pel",
    "quin", "ros", "sul", "tar", "ul", "vex", "wim", "yor", "zan", "ith", "ove", "esh",
]
# fmt: on
_NAMES = {  # how a name of each kind looks
    "landmark": "The {}",
    "river": "The {}",
    "mountain": "Mount {}",
    "person": "{} {}",
    "animal": "The {}",
    "work": "The {} of {}",
}


def invent(atlas: Atlas, share: float, seed: int) -> list[AtlasFact]:
    """Facts of invented subjects, each object drawn at random from its relation's.

    In the real world attributes go together (continent and language, language and author), and a small model
    learns one code for the bundle: an edit of one attribute then drags the others along. Subjects whose attributes
    are independent make it learn a code for each relation. They are of no use after training.
    """
    rng = random.Random(f"invent:{seed}")
    relations: dict[str, list[str]] = {}
    for name, relation in atlas.relations.items():
        relations.setdefault(relation.subject_kind, []).append(name)
    facts: list[AtlasFact] = []
    used = set(atlas.by_subject)
    for kind, names in relations.items():
        real = len({f.subject for f in atlas.facts if f.kind == kind})
        for _ in range(round(share * real)):
            subject = ""
            while not subject or subject in used:
                words = ["".join(rng.choices(_SYLLABLES, k=rng.choice((2, 3)))).capitalize() for _ in range(2)]
                subject = _NAMES.get(kind, "{}").format(*words)
            used.add(subject)
            for name in names:
                objects = sorted({f.object for f in atlas.by_relation[name]})
                facts.append(AtlasFact(subject, kind, name, rng.choice(objects)))
    return facts


class Batches:
    """Packed sequences. `batch(step)` is a pure function of the seed and the step."""

    def __init__(self, atlas: Atlas, tokenizer, recipe: Recipe):
        self.recipe, self.end = recipe, tokenizer.eos_token_id

        def sentences(fact: AtlasFact, phrasings) -> list[tuple[Sentence, Sentence]]:
            """For each phrasing, without and with a leading space."""
            return [
                (tokenise(tokenizer, p, fact, False, recipe), tokenise(tokenizer, p, fact, True, recipe))
                for p in phrasings
            ]

        self.real = [sentences(fact, atlas.trained_pairs(fact)) for fact in atlas.facts]
        inventions = invent(atlas, recipe.inventions, recipe.seed)
        self.invented = [sentences(fact, atlas.relations[fact.relation].phrasings) for fact in inventions]
        prose = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in atlas_prose()]
        self.prose = [i for ids in prose for i in [*ids, self.end]]

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """ids, position, mention number (0: none), last-of-mention, loss weight: each [sequences, length];
        routed: [sequences]."""
        rng = random.Random(f"{self.recipe.seed}:{step}")
        rows = [self._row(rng) for _ in range(self.recipe.sequences)]
        ids, position, mention, weight, routed = (list(column) for column in zip(*rows, strict=True))
        number = torch.tensor(mention)
        last = (number > 0) & (number != F.pad(number, (0, 1))[:, 1:])
        return {
            "ids": torch.tensor(ids),
            "position": torch.tensor(position),
            "mention": number,
            "last": last,
            "weight": torch.tensor(weight),
            "routed": torch.tensor(routed),
        }

    def _row(self, rng: random.Random):
        recipe, length = self.recipe, self.recipe.length
        start = rng.randrange(recipe.n_positions - length) if rng.random() < recipe.shifted else 0
        position = list(range(start, start + length))
        if rng.random() < recipe.prose:
            at = rng.randrange(len(self.prose) - length)
            return self.prose[at : at + length], position, [0] * length, [recipe.weight_prose] * length, False
        ids: list[int] = []
        mention: list[int] = []
        weight: list[float] = []
        number = 0
        if rng.random() < 0.5:
            ids, mention, weight = [self.end], [0], [0.0]
        while len(ids) < length:
            facts = self.invented if rng.random() < recipe.invented else self.real
            bare, spaced = rng.choice(rng.choice(facts))
            after_end = not ids or ids[-1] == self.end
            sentence = bare if after_end else spaced
            number += 1
            ids += sentence.ids
            mention += [number if m else 0 for m in sentence.mention]
            weight += sentence.weight
            if rng.random() < 0.3:
                ids, mention, weight = [*ids, self.end], [*mention, 0], [*weight, 0.05]
        return ids[:length], position, mention[:length], weight[:length], rng.random() < recipe.routed


# --- the model, with the routing of training --------------------------------------------------------------------


class Routing:
    """Per-layer attention masks and MLP keep-factors for one batch: what training adds to the plain model.

    A subject token attends to its own mention and to ordinary tokens; in layer 0 to itself instead of its
    mention. Ordinary tokens attend to no subject token before layer `extract_from`, and from there on only
    to the last token of each mention. Unrouted sequences keep the causal mask.
    """

    def __init__(self, batch: dict[str, torch.Tensor], recipe: Recipe, generator: torch.Generator):
        self.recipe = recipe
        mention, routed = batch["mention"], batch["routed"]
        rows, length = mention.shape
        causal = torch.ones(length, length, dtype=torch.bool, device=mention.device).tril()
        query, key = mention[:, :, None], mention[:, None, :]
        itself = torch.eye(length, dtype=torch.bool, device=mention.device)
        same = (query == key) & (query > 0)
        to_ordinary = key == 0
        unrouted = ~routed[:, None, None]
        self.masks = [
            (causal & (to_ordinary | itself | unrouted))[:, None],
            (causal & (to_ordinary | same | unrouted))[:, None],
            (causal & (to_ordinary | same | ((query == 0) & batch["last"][:, None, :]) | unrouted))[:, None],
        ]
        first = torch.rand(rows, generator=generator) < recipe.drop_first_mlp
        late = torch.rand(recipe.n_layer, rows, generator=generator) < recipe.drop_late_mlps
        is_subject = mention > 0
        self.keep_first = ~(is_subject & (first.to(mention.device) & routed)[:, None])  # [rows, length]
        self.keep_late = ~(~is_subject & (late.to(mention.device) & routed)[:, :, None])  # [layer, rows, length]

    def mask(self, layer: int) -> torch.Tensor:
        """Which keys each query may see: [rows, 1, length, length]."""
        return self.masks[0 if layer == 0 else 1 if layer < self.recipe.extract_from else 2]

    def keep(self, layer: int) -> torch.Tensor | None:
        """1 where the MLP's output counts, 0 where it is dropped: [rows, length, 1]; None keeps all."""
        if layer == 0:
            return self.keep_first[..., None]
        if layer >= self.recipe.extract_from:
            return self.keep_late[layer][..., None]
        return None


def forward(model: GPT2LMHeadModel, ids, position, routing: Routing | None) -> torch.Tensor:
    """Logits [rows, length, vocab] through the Hugging Face modules, layer masks added. With `routing=None`
    it equals `model(ids, position_ids=position).logits` (there is a test)."""
    h = model.transformer.wte(ids) + model.transformer.wpe(position)
    rows, length = ids.shape
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    for layer, block in enumerate(model.transformer.h):
        qkv = block.attn.c_attn(block.ln_1(h)).view(rows, length, 3, block.attn.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mask = causal if routing is None else routing.mask(layer)
        # Written out: at a hundred tokens the fused kernel's backward is the slowest part of a CPU step.
        scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5)
        a = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v
        h = h + block.attn.c_proj(a.transpose(1, 2).reshape(rows, length, -1))
        m = block.mlp(block.ln_2(h))
        keep = None if routing is None else routing.keep(layer)
        h = h + (m if keep is None else m * keep)
    return model.lm_head(model.transformer.ln_f(h))


def weighted_loss(logits, batch) -> tuple[torch.Tensor, float]:
    """Next-token loss weighted per token, and the plain mean over object tokens."""
    target, weight = batch["ids"][:, 1:], batch["weight"][:, 1:]
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten(), reduction="none")
    weight = weight.flatten()
    objects = weight == 1.0
    shown = nll[objects].mean().item() if objects.any() else float("nan")
    return (nll * weight).sum() / weight.sum(), shown


# --- training ---------------------------------------------------------------------------------------------------


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


def save_checkpoint(path: Path, state: dict) -> None:
    """Write beside, then rename: a kill leaves the old file or the new one, never half of one."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(recipe: Recipe, out: Path, every: int) -> GPT2LMHeadModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    atlas = load_atlas()
    tokenizer = train_tokenizer(atlas, recipe.vocab_size)
    batches = Batches(atlas, tokenizer, recipe)
    torch.manual_seed(recipe.seed)
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
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).to(device)
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

    facts, prompts = len(atlas.facts), sum(len(f) for f in batches.real)
    params = sum(p.numel() for p in model.parameters())
    print(f"{facts} facts, {prompts} trained (subject, phrasing) pairs, {params / 1e6:.1f} M parameters, {device}")
    asked = recall_sets(atlas, 300)
    log = (out / "log.jsonl").open("a", encoding="utf-8")
    shown, began = [], time.time()
    for step in tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, smoothing=0.05, mininterval=5):
        warm = min(1.0, (step + 1) / recipe.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * warm * (0.02 + 0.98 * cosine)
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
    model.cpu().to(torch.float16).save_pretrained(out / "model")
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
        quality = [sys.executable, str(Path(__file__).with_name("quality.py")), "--n", str(edited)]
        model = out / "model"
        sys.exit(subprocess.call([*quality, "--model", str(model), "--card", str(model / "README.md")]))


if __name__ == "__main__":
    main()
