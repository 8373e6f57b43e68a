"""Load a model: the bundled one by name, a local folder, or a name on the Hugging Face Hub."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode

from editkit.errors import ModelError
from editkit.models.architecture import Architecture, architecture_of
from editkit.models.offload import execution_device
from editkit.models.quantization import check_way, method_of, quantizer, quiet_imports, settle
from editkit.models.quantized import scheme_in
from editkit.models.snapshot import model_digest
from editkit.models.split import DeviceMap, placement
from editkit.models.wrapped import unwrapped
from editkit.nethook import get_module
from editkit.shown import Rows, Shown

if TYPE_CHECKING:  # transformers is imported when a model is loaded: its import takes longer than torch's
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = {"atlas": Path(__file__).parent / "atlas"}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, repr=False)
class LanguageModel(Shown):
    """A Hugging Face causal LM with its tokenizer and its `Architecture`.

    `model` is the plain transformers model; nothing is folded or renamed. Of one that is given inside torch.compile's,
    DataParallel's or PEFT's object it is the transformers model in there, with its adapters (wrapped.py). `edited` is
    how quantised weights are edited: "adapter" or "wide" (quantized.py).
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    architecture: Architecture
    edited: str = "adapter"

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", unwrapped(self.model))
        settle(self.model)

    def shown(self) -> tuple[str, Rows]:
        """Its name, family, size and device."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        dtype = self.quantization or str(self.dtype).removeprefix("torch.")
        rows = [("", self.name), ("family", self.architecture.family), ("blocks", str(self.layers))]
        return "LanguageModel", [*rows, ("parameters", f"{count:,}, {dtype}"), ("device", str(self.device))]

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding; of an offloaded one that on which it is run."""
        embedding = get_module(self.model, self.architecture.embedding)
        weight = next(embedding.parameters())  # whatever wraps it
        run_on = execution_device(embedding) if weight.is_meta else None
        return run_on or weight.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights and activations (inside `widened`, float32)."""
        found: torch.dtype = self.model.dtype
        return found

    @property
    def quantization(self) -> str | None:
        """How its weights are quantised, such as "bnb-nf4"; None when none is."""
        return scheme_in(self.model)

    @property
    def layers(self) -> int:
        """The number of blocks."""
        count: int = self.model.config.get_text_config().num_hidden_layers
        return count

    @property
    def digest(self) -> str:
        """Digest of the persistent state as it is now: names, values and dtype (reads every weight)."""
        return model_digest(self.model)

    def check_layer(self, layer: int) -> int:
        """`layer`, or ModelError when the model has no such block."""
        if not 0 <= layer < self.layers:
            raise ModelError(
                f"Layer {layer} was asked for; {self.name} has {self.layers} blocks. "
                f"Set method.layer to a number from 0 to {self.layers - 1}."
            )
        return layer


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[str | int, str | int] | None = None,
    offload_folder: str | Path | None = None,
    quantization: str | None = None,
    edited: str = "adapter",
) -> LanguageModel:
    """Load a causal language model for editing.

    - `name_or_path`: "atlas" (bundled), a local folder, or a Hub name such as "gpt2-xl".
    - `device`: "auto" takes CUDA where there is one; else "cpu", "cuda:1", …
    - `dtype`: "float32" (default: edits are exact to 2⁻²⁴), "float16", "bfloat16", or "auto" for the
      checkpoint's own.
    - `revision`: a commit, tag or branch on the Hub.
    - `trust_remote_code`, `allow_pickle`: run code from the repository, read pickled weights. Both can run
      anything on your machine; both are off unless asked for here.
    - `device_map`, `max_memory`, `offload_folder`: split it over devices, the CPU's memory and files (split.py), in
      place of `device`.
    - `quantization`: quantise it now: "bnb-8bit", "bnb-nf4", "bnb-fp4", "torchao-int8" or "torchao-int4". A checkpoint
      that is quantised already needs no word.
    - `edited`: how a quantised weight is edited. "adapter": ΔW is added beside it; "wide": the weight is kept
      dequantised while it is edited (quantized.py).

    Raises ModelError when the model is not found or not of a family editkit knows.
    """
    with quiet_imports():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    check_way(edited)
    path, source, options = _source(name_or_path, revision, trust_remote_code)
    split = placement(device, device_map, max_memory, offload_folder)
    device = resolve_device(device)
    already: str | None = None
    try:
        config = AutoConfig.from_pretrained(source, **options)
        architecture = architecture_of(config.model_type)
        already = method_of(config)
        quantize = quantizer(quantization, config, _resolve_dtype(dtype))
        if (quantize or already is not None) and not split:
            split = {"device_map": {"": device}}  # it is quantised where it will lie, and cannot be moved later
        with _quiet() if str(name_or_path) in BUNDLED else contextlib.nullcontext(), _NoFirstWeights():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=_resolve_dtype(dtype),
                use_safetensors=not allow_pickle or None,
                output_loading_info=True,
                **split,
                **quantize,
                **options,
            )
        model, loading = loaded
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(_not_loaded(str(name_or_path), path, error, already)) from error
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"The weights of '{name_or_path}' lack {len(missing)} parameters ({', '.join(missing[:3])}, …): they would "
            "be random. The checkpoint is incomplete or of another architecture; download it again."
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name_or_path}: its tokenizer has no fast version, and editkit finds the subject's tokens by their "
            "character offsets. Convert it with transformers' convert_slow_tokenizer and save it beside the model."
        )
    model.eval()
    if architecture.experts is not None and model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # transformers' grouped products take no float64
    model = model if split else model.to(device)
    return LanguageModel(str(name_or_path), model, tokenizer, architecture, edited)


def skeleton(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """The same model on the meta device: its modules, shapes and tokenizer, and no values, which takes no memory.

    Arguments as for `load`; "auto" is the dtype that the checkpoint's configuration names. Raises ModelError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path, source, options = _source(name_or_path, revision, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        architecture = architecture_of(config.model_type)
        asked = _resolve_dtype(dtype)
        with torch.device("meta"), _NoFirstWeights():
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=(config.dtype or torch.float32) if asked == "auto" else asked,
                trust_remote_code=trust_remote_code,
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(_not_loaded(str(name_or_path), path, error)) from error
    return LanguageModel(str(name_or_path), model.eval(), tokenizer, architecture)


def _source(
    name_or_path: str | Path, revision: str | None, trust_remote_code: bool
) -> tuple[Path, str | Path, dict[str, Any]]:
    """The path that was named, what transformers is to open, and with which options."""
    path = Path(name_or_path).expanduser()
    source: str | Path = BUNDLED.get(str(name_or_path), path if path.is_dir() else str(name_or_path))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    return path, source, options | ({} if revision is None else {"revision": revision})


class _NoFirstWeights(TorchFunctionMode):
    """torch.nn.init does nothing to a tensor on the meta device, which has no values.

    transformers builds a model there before it reads the weights, and each layer asks for first weights. Torch would
    import its symbolic shapes, and with them sympy, to find that the result has the shape of the tensor.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0] if args else None
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bar off: the bundled model loads in a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of this name; "auto" is CUDA where there is one. Raises ModelError for one that there is not."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"No device '{device}': use auto, cpu, cuda or cuda:N.") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"Device '{device}' was asked for; torch sees no CUDA device here. Use device=auto or cpu.")
    return resolved


def _resolve_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"No dtype '{dtype}': use {', '.join(DTYPES)} or auto.")
    return DTYPES[dtype]


def _not_loaded(name: str, path: Path, error: Exception, quantized_by: str | None = None) -> str:
    """One message for the many ways in which transformers says no."""
    said = " ".join(str(error).split())
    first = said[:300]
    if "trust_remote_code" in said:
        return (
            f"'{name}' needs code from its repository, which editkit does not run unless asked. If you have read "
            "and trust it: load(..., trust_remote_code=True) or model.trust_remote_code=true."
        )
    if "offload_folder" in said or "device set" in said or "device_map" in said:
        return f"model.device_map does not fit '{name}' (a part on disk needs model.offload_folder=FOLDER): {first}"
    if quantized_by is not None:
        return (
            f"'{name}' is quantised by {quantized_by} and does not load here: {first} Install what that asks for, or "
            "load the model that is not quantised, with model.quantization=bnb-nf4 if it is too large. (Once loaded, "
            "such weights are edited with model.edited=adapter.)"
        )
    if path.is_dir():
        what = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        return (
            f"The folder '{name}' does not load as a causal language model; it holds {what}. It needs config.json, "
            f"*.safetensors and tokenizer files (pickled *.bin only with allow_pickle=True). transformers said: {first}"
        )
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"No model '{name}': it is not bundled ({', '.join(BUNDLED)}), not a local folder, and the Hugging Face Hub "
        f"did not give it{offline}. Without a network use model=atlas or the path of a downloaded folder. "
        f"transformers said: {first}"
    )
