"""The constants of a method: what its authors published for each model, and the rule for any other model.

The numbers are in the methods' own files.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DEPTH_FRACTION = 0.35  # GPT-2 XL's 17 of 48, where a model has no published block
RANGE = 5  # blocks at most of a range that nobody published

_ALIASES = {  # a model's other names on the Hub, and its tuned versions, which are edited with the same constants
    "Meta-Llama-3-8B": "Llama-3-8B",
    "Meta-Llama-3-8B-Instruct": "Llama-3-8B",
    "Llama-2-7b-hf": "Llama-2-7B",
    "Llama-2-7b-chat-hf": "Llama-2-7B",
    "Llama-3.2-3B-Instruct": "Llama-3.2-3B",
    "Qwen2.5-7B-Instruct": "Qwen2.5-7B",
}

# What EasyEdit's files (github.com/zjunlp/EasyEdit, hparams/) have for Qwen2.5-7B, Llama-2-7B and Llama-3.2-3B, in each
# method. Where others disagree, the methods' files say so beside the blocks.
EASYEDIT: Mapping[str, Any] = {"clamp": 4.0, "steps": 25, "lr": 0.5, "weight_decay": 1e-3}


@dataclass(frozen=True)
class Constants:
    """What one method takes for each model, by the names of its settings.

    - `published`: for each model, by the last part of its name, what the authors' files say.
    - `default`: for a model about which nothing was published.
    - `blocks`: how the settings name the blocks to edit: one `layer`; `layers` with one block; a `range` of `layers`.
      "" for a method that is told elsewhere.
    - `like`: the constants of the method whose block is taken where nothing was published: ROME's, for most.
    - `depth`: where there is no such method either, the block is the one at this share of the depth.
    """

    default: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    blocks: Literal["", "layer", "layers", "range"] = ""
    like: "Constants | None" = None
    depth: float = DEPTH_FRACTION

    def of(self, model_name: str, layers: int) -> dict[str, Any]:
        """The constants for the model of this name with `layers` blocks: published, else proposed.

        A block that nobody published is the one at 0.35 of the depth; a range ends at that block and holds an eighth of
        the blocks, at most five.

        >>> Constants({"clamp": 4.0}, {"gpt2-medium": {"clamp": 3.0}}).of("openai-community/gpt2-medium", 24)
        {'clamp': 3.0}
        >>> Constants({"clamp": 4.0}, blocks="layer").of("my-model", 12)
        {'clamp': 4.0, 'layer': 4}
        >>> Constants(blocks="range").of("gpt2-large", 36)
        {'layers': (9, 10, 11, 12)}
        """
        name = model_name.rstrip("/").rsplit("/", 1)[-1]
        found = {**self.default, **self.published.get(_ALIASES.get(name, name), {})}
        if (deepest := max(found.get("layers", (found.get("layer", 0),)))) >= layers:
            warnings.warn(
                f"the published constants for '{name}' are for block {deepest}, and this model has {layers} blocks: it "
                "takes the defaults, as a model of another name",
                stacklevel=2,
            )
            found = dict(self.default)
        if not self.blocks or "layer" in found or "layers" in found:
            return found
        last = self._proposed(model_name, layers)
        if self.blocks == "layer":
            return found | {"layer": last}
        count = 1 if self.blocks == "layers" else max(1, min(RANGE, layers // 8, last + 1))
        return found | {"layers": tuple(range(last - count + 1, last + 1))}

    def _proposed(self, model_name: str, layers: int) -> int:
        """The block of `like`, else the one at 0.35 of the depth."""
        if self.like is None:
            return int(self.depth * layers)
        found = self.like.of(model_name, layers)
        return int(found["layer"] if "layer" in found else found["layers"][-1])
