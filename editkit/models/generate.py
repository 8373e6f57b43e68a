"""Text from a model: greedy, or sampled with a seed, one prompt after the other or side by side.

A prefix that is in force (prefix.py) stands in front of each prompt; what is returned is without it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editkit.errors import FactError
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.models.precision import widened
from editkit.models.prefix import prefix_of
from editkit.models.tokens import positions_of

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


def room_behind(lm: LanguageModel, prompts: Sequence[str]) -> int | None:
    """How many tokens the model has positions for behind the longest of `prompts`; None: it has no limit."""
    limit = positions_of(lm)
    return None if limit is None else limit - max(map(len, _encoded(lm, prompts)), default=0)


def end_tokens(lm: LanguageModel) -> set[int]:
    """The tokens with which the model ends a text, as its generation_config names them."""
    found: int | list[int] | None = getattr(lm.model.generation_config, "eos_token_id", None)
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def text_of(lm: LanguageModel, tokens: list[int]) -> str:
    """The text of generated tokens, without special ones."""
    return str(lm.tokenizer.decode(tokens, skip_special_tokens=True))


def _encoded(lm: LanguageModel, prompts: Sequence[str]) -> list[list[int]]:
    prefix = prefix_of(lm.model)
    return [lm.tokenizer(prefix + prompt)["input_ids"] for prompt in prompts]


def _ends_with(lm: LanguageModel, stops: Sequence[str], width: int, least: int) -> Any:
    """What makes transformers end a row that has said one of `stops` behind its first `width` tokens, and `least`."""
    from transformers import StoppingCriteriaList

    said: list[bool] = []  # by row

    def ended(input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        nonlocal said
        latest = [any(stop in text for stop in stops) for text in lm.tokenizer.batch_decode(input_ids[:, -1:])]
        said = [a or b for a, b in zip(said or latest, latest, strict=True)]
        enough = input_ids.shape[1] - width >= least
        return torch.tensor([enough and each for each in said], device=input_ids.device)

    return StoppingCriteriaList([ended])


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

    Arguments and errors are those of `generate_tokens`.
    """
    found = generate_tokens(lm, prompts, new_tokens, top_k=top_k, seed=seed, past_end=past_end)
    return [text_of(lm, row) for row in found]


@in_eval_mode
@torch.inference_mode()
def generate_tokens(
    lm: LanguageModel,
    prompts: Sequence[str],
    new_tokens: int | Sequence[int],
    *,
    top_k: int | None = None,
    seed: int = 0,
    past_end: bool = False,
    stops: Sequence[str] = (),
    least: int = 0,
) -> list[list[int]]:
    """The tokens of continuations of all `prompts` side by side: greedy, or sampled from the `top_k` with `seed`.

    - `new_tokens`: of all, or of each.
    - `past_end`: go on behind an end token, which the text then does not show.
    - `stops`: a row may end once it has said one of these, and has `least` tokens. The others go on, so what follows
      in a row that has ended is padding, if anything; what is behind a stop has no meaning.

    Greedy ones are those of `generate`, several times sooner; sampled ones belong to the whole list. Prompts are
    padded on the left, and transformers counts positions from the mask. The global random state is left as it was.
    Raises FactError for more tokens than the model has positions for.
    """
    if not prompts:
        return []
    rows = _encoded(lm, prompts)
    counts = [new_tokens] * len(rows) if isinstance(new_tokens, int) else list(new_tokens)
    width, most = max(map(len, rows)), max(counts)
    limit = positions_of(lm)
    if limit is not None and width + most > limit:
        raise FactError(
            f"A prompt of {width} tokens was to be continued by {most}; '{lm.name}' has {limit} positions. "
            "Shorten it, or ask for fewer tokens."
        )
    if most < 1:
        return [[] for _ in rows]
    pad_id = next(i for i in (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id, 0) if i is not None)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=lm.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
    options: dict[str, Any] = {"do_sample": False}
    if top_k is not None:
        options = {"do_sample": True, "top_k": top_k, "temperature": 1.0, "top_p": 1.0}
    if stops:
        options["stopping_criteria"] = _ends_with(lm, stops, width, least)
    if past_end:
        options["eos_token_id"] = lm.model.config.get_text_config().vocab_size  # no token ends it
    with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []), _plainly(lm.model), widened(lm):
        torch.manual_seed(seed)
        run: Any = lm.model.generate
        out = run(ids, attention_mask=mask, max_new_tokens=most, pad_token_id=pad_id, **options)
    return [row[width : width + count].tolist() for row, count in zip(out, counts, strict=True)]


@in_eval_mode
def generate(
    lm: LanguageModel, prompts: Sequence[str], new_tokens: int, *, top_k: int | None = None, seed: int = 0
) -> list[str]:
    """Continuations of `prompts` without the prompts: greedy, or sampled from the `top_k` with `seed`.

    An empty prompt starts from the tokenizer's BOS or EOS token. The global random state is left as it was.
    """
    prefix, start = prefix_of(lm.model), lm.tokenizer.bos_token_id
    start = lm.tokenizer.eos_token_id if start is None else start
    texts = []
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(), _plainly(lm.model), widened(lm):
        torch.manual_seed(seed)
        for prompt in prompts:
            ids = lm.tokenizer(prefix + prompt)["input_ids"] or [start]
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
