"""An edit as a GGUF LoRA adapter, which llama.cpp adds to a converted base: `llama-cli -m base.gguf --lora edit.gguf`.

llama.cpp computes W k + (alpha / r) B (A k) with A = right [r, d_ff] and B = left [d_model, r], for every format of W
(build_lora_mm of its llama-graph.cpp). The file is as its convert_lora_to_gguf.py writes one: general.type is
"adapter", adapter.type "lora", the architecture is the base's, and the down-projection of block N has the tensors
blk.N.ffn_down.weight.lora_a and .lora_b. One alpha holds for all tensors, and r is read off each, so all are padded
with zeros to the largest rank, which is alpha too: the factor alpha / r is then exactly 1.

A family says in its entry (`Architecture.llama_cpp`) what llama.cpp calls it; that is said only where its ffn_down is
our down-projection, row by row and column by column. Other weights, as those of attention, may be permuted or joined
by the conversion, and experts lie in another tensor: edits of them are refused.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.nn.functional import pad

from editkit.edits.delta import Delta
from editkit.errors import EditkitError
from editkit.files import whole
from editkit.models.architecture import matrix_shape, orientation
from editkit.models.load import LanguageModel
from editkit.models.offload import shape_of
from editkit.nethook import NameNotFound, get_module

SUFFIX = ".gguf"


def write_gguf(
    deltas: Sequence[Delta],
    base: Mapping[str, str],
    provenance: Mapping[str, Any],
    path: Path,
    lm: LanguageModel,
    rank: int | None = None,
) -> dict[str, float]:
    """Write a GGUF LoRA adapter, whole or not at all; the relative error of each weight's ΔW.

    - `deltas`: the changes of an edit. A factored ΔW is written as it is.
    - `base`: name, digest and dtype of the model they are for. `provenance`: that of the edit.
    - `path`: of the file, ending in .gguf.
    - `lm`: the base, of which only the family and shapes are read: `skeleton(name)` will do.
    - `rank`: cut each ΔW to this many of its largest singular values. If None, a dense ΔW is cut to its numerical
      rank.

    Returns ‖ΔW written − ΔW‖ / ‖ΔW‖ by parameter name. Raises EditkitError for an edit without deltas, of a family that
    llama.cpp does not run, or of another weight than a down-projection of `lm`; OutputError when the file cannot be
    written.
    """
    # 1) What can be written: each refusal names its reason.
    if not deltas:
        raise EditkitError("This edit changes nothing: there is no adapter to write.")
    if path.suffix != SUFFIX:
        raise EditkitError(f"'{path}' was named for a GGUF adapter, which is one file: name FILE{SUFFIX}.")
    if (family := lm.architecture.llama_cpp) is None:
        raise EditkitError(
            f"'{lm.name}' is of the family '{lm.architecture.family}', {_reason(lm)}. Export it to peft, or merge it "
            "into a checkpoint: python -m editkit.edits merge."
        )
    tensors = {_block(delta, lm): delta.factors(rank) for delta in deltas}
    writer = _writer_class()(None, family)
    # 2) What the file says of itself.
    name = Path(base["name"]).name  # never a path of this machine
    largest = max(right.shape[0] for _, right, _ in tensors.values())
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(largest))
    writer.add_name(f"An edit of {name} by {provenance.get('method', 'an unknown method')}")
    writer.add_string("editkit.base.name", name)
    writer.add_string("editkit.base.digest", base["digest"])
    # 3) The factors, of one rank.
    for block, (left, right, _) in sorted(tensors.items()):
        missing = largest - right.shape[0]
        tensor = f"blk.{block}.ffn_down.weight"
        writer.add_tensor(f"{tensor}.lora_a", pad(right, (0, 0, 0, missing)).contiguous().numpy())
        writer.add_tensor(f"{tensor}.lora_b", pad(left, (0, missing)).contiguous().numpy())
    with whole(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {delta.parameter: error for delta, (_, _, error) in zip(deltas, tensors.values(), strict=True)}


def _reason(lm: LanguageModel) -> str:
    """Why an edit of this family has no adapter in llama.cpp."""
    if lm.architecture.experts is not None:
        return "whose experts llama.cpp holds in one tensor of its own: a LoRA of our joint weight does not fit it"
    return "which llama.cpp does not run, or under a name that this family's entry does not say"


def _block(delta: Delta, lm: LanguageModel) -> int:
    """The number of the block whose down-projection is changed. Raises EditkitError for another weight."""
    block = next((layer for layer in range(lm.layers) if lm.architecture.down(layer) == delta.module), None)
    if block is None:
        raise EditkitError(
            f"This edit changes {delta.parameter}, which is no down-projection of '{lm.name}'. llama.cpp may hold such "
            "a weight permuted or joined with others, so only changes of down-projections are exported to GGUF."
        )
    try:
        kind = orientation(get_module(lm.model, delta.module), delta.module)
        found = matrix_shape(shape_of(lm.model, delta.parameter), kind)
    except NameNotFound as error:
        raise EditkitError(
            f"'{lm.name}' has no {delta.parameter}. Name the base that the edit was made for."
        ) from error
    if found != delta.shape:
        raise EditkitError(
            f"This edit changes {delta.parameter} by a ΔW {list(delta.shape)}, and the weight in '{lm.name}' is "
            f"{list(found)}. Name the base that the edit was made for."
        )
    return block


def _writer_class() -> Any:
    """gguf's writer, without its notes on the console. Raises EditkitError where gguf is not installed."""
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise EditkitError(
            "GGUF files are written by the package gguf, which is not installed: pip install 'editkit[gguf]'."
        ) from error
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    return GGUFWriter
