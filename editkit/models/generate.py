"""Text from a model: greedy, or sampled with a seed, one prompt after the other or side by side."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from editkit.errors import FactError
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.models.precision import widened

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def _plainly(model: "PreTrainedModel") -> Iterator[None]:
    """Generation as the caller asks for it: a checkpoint's own habits (a repetition penalty, beams) are set aside.

    They come with many instruction-tuned models, and with them "greedy" would not be the likeliest token each time.
    """
    from transformers import GenerationConfig

    kept = model.generation_config
    if kept is not None:
        marks = {name: getattr(kept, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        model.generation_config = GenerationConfig(**{f"{name}_token_id": token for name, token in marks.items()})
    try:
        yield
    finally:
        model.generation_config = kept


@in_eval_mode
@torch.inference_mode()
def generate_batch(
    lm: LanguageModel,
    prompts: Sequence[str],
    new_tokens: int | Sequence[int],
    *,
    top_k: int | None = None,
    seed: int = 0,
    past_end: bool = False,
) -> list[str]:
    """Continuations of all `prompts` side by side: greedy, or sampled from the `top_k` with `seed`.

    - `new_tokens`: of all, or of each.
    - `past_end`: go on behind an end token, which the text then does not show.

    Greedy ones are those of `generate`, several times sooner; sampled ones belong to the whole list. Prompts are
    padded on the left, and transformers counts positions from the mask. The global random state is left as it was.
    Raises FactError for more tokens than the model has positions for.
    """
    if not prompts:
        return []
    rows = [lm.tokenizer(prompt)["input_ids"] for prompt in prompts]
    counts = [new_tokens] * len(rows) if isinstance(new_tokens, int) else list(new_tokens)
    width, most = max(map(len, rows)), max(counts)
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and width + most > limit:
        raise FactError(
            f"A prompt of {width} tokens was to be continued by {most}; '{lm.name}' has {limit} positions. "
            "Shorten it, or ask for fewer tokens."
        )
    if most < 1:
        return [""] * len(rows)
    pad_id = next(i for i in (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id, 0) if i is not None)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=lm.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
    options: dict[str, Any] = {"do_sample": False}
    if top_k is not None:
        options = {"do_sample": True, "top_k": top_k, "temperature": 1.0, "top_p": 1.0}
    if past_end:
        options["eos_token_id"] = lm.model.config.get_text_config().vocab_size  # no token ends it
    with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []), _plainly(lm.model), widened(lm):
        torch.manual_seed(seed)
        run: Any = lm.model.generate
        out = run(ids, attention_mask=mask, max_new_tokens=most, pad_token_id=pad_id, **options)
    new = [row[width : width + count] for row, count in zip(out, counts, strict=True)]
    return [str(lm.tokenizer.decode(row, skip_special_tokens=True)) for row in new]


@in_eval_mode
def generate(
    lm: LanguageModel, prompts: Sequence[str], new_tokens: int, *, top_k: int | None = None, seed: int = 0
) -> list[str]:
    """Continuations of `prompts` without the prompts: greedy, or sampled from the `top_k` with `seed`.

    An empty prompt starts from the tokenizer's BOS or EOS token. The global random state is left as it was.
    """
    start = lm.tokenizer.bos_token_id
    start = lm.tokenizer.eos_token_id if start is None else start
    texts = []
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(), _plainly(lm.model), widened(lm):
        torch.manual_seed(seed)
        for prompt in prompts:
            ids = lm.tokenizer(prompt)["input_ids"] or [start]
            run: Any = lm.model.generate
            out = run(
                torch.tensor([ids], device=lm.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=lm.device),
                max_new_tokens=new_tokens,
                do_sample=top_k is not None,
                pad_token_id=start,
                **({"top_k": top_k, "temperature": 1.0, "top_p": 1.0} if top_k else {}),
            )
            texts.append(lm.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    return texts
