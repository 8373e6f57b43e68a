"""`Trace`: capture and change what passes through named modules.

A Trace adds its own hooks on entry and removes those, and no others, on every exit. It keeps nothing on the model.
"""

import copy
import inspect
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .names import HookError, NameNotFound, get_module
from .shown import Shown, row_of

Change = Callable[..., Tensor]  # (hidden) -> hidden, or (hidden, site) -> hidden
Changes = Change | Mapping[str, Change] | None
Args = tuple[Any, ...]  # of a module's call
Kwargs = dict[str, Any]


class _StopForward(Exception):
    """Leaves the forward pass; caught by the Trace that raised it (its argument) and by no other."""


def _locate(output: Any, what: str = "") -> tuple[Any, Tensor]:
    """Key and value of the first tensor in a tuple, list or mapping."""
    listed = enumerate(output) if isinstance(output, tuple | list) else ()
    for key, item in output.items() if isinstance(output, Mapping) else listed:
        if isinstance(item, Tensor):
            return key, item
    raise HookError(f"{what or f'A {type(output).__name__}'} holds no tensor at its top level: choose another site.")


def hidden(output: Any) -> Tensor:
    """The hidden tensor of a module's output: the output itself, or the first tensor in a tuple, list or mapping."""
    return output if isinstance(output, Tensor) else _locate(output)[1]


def with_hidden(output: Any, h: Tensor) -> Any:
    """`output` with its hidden tensor replaced by `h`. The container is copied, not changed."""
    if isinstance(output, Tensor):
        return h
    key, old = _locate(output)
    if old is h:
        return output
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[key] = h
        return changed
    parts = [*output[:key], h, *output[key + 1 :]]
    return output._make(parts) if hasattr(output, "_make") else type(output)(parts)


def with_input(args: Args, kwargs: Kwargs, change: Change, site: str = "") -> tuple[Args, Kwargs]:
    """Call arguments with `change` applied to the hidden tensor: the first tensor in args, else hidden_states."""
    named: dict[Any, Any] = {**dict(enumerate(args)), "hidden_states": kwargs.get("hidden_states"), **kwargs}
    key, h = _locate(named, f"The call of '{site}'" if site else "The call")
    if isinstance(key, str):
        return args, kwargs | {key: change(h)}
    return (*args[:key], change(h), *args[key + 1 :]), kwargs


def _detached(value: Any) -> Any:
    """Detach every tensor in a call's arguments, so that keeping them does not keep graphs."""
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return type(value)(map(_detached, value)) if type(value) in (tuple, list) else value


def _reading(what: str) -> Any:
    return property(lambda self: self._record().read(what))


class _Readable:
    """The attributes of one run of a site."""

    input: Tensor = _reading("input")  # the first tensor argument, e.g. [batch, tokens, d]
    inputs: tuple[Args, Kwargs] = _reading("inputs")  # (args, kwargs); only `input` is cut to positions or copied
    output: Tensor = _reading("output")  # e.g. [batch, tokens, d]
    grad: Tensor = _reading("grad")  # at the output and shaped like it, of the latest backward pass
    calls: list["Record"] = _reading("calls")  # if calls="all" every run of the site, else the last only
    count: int = _reading("count")  # how often the site ran


class Record(Shown, _Readable):
    """One run of a site; `t[site]` is the last."""

    def __init__(self, site: str, asked: Mapping[str, bool], stored: Callable[[str, Tensor], Tensor]) -> None:
        self.site, self._asked, self._stored = site, asked, stored
        self._earlier: list[Record] = []
        self._count = 1
        self._kept: dict[str, Any] = {}
        self._versions: dict[str, int] = {}

    def _record(self) -> "Record":
        return self

    def _shown(self) -> tuple[str, list[list[str]]]:
        return "Record", [row_of(self.site, self._count, self._kept)]

    def keep(self, what: str, tensor: Tensor) -> Tensor:
        if self._asked[what]:
            self._kept[what] = tensor = self._stored(self.site, tensor)
            self._versions[what] = 0 if tensor.is_inference() else tensor._version  # inference tensors count none
        return tensor

    def read(self, what: str) -> Any:
        if what in ("calls", "count"):
            return self._count if what == "count" else [*self._earlier, self]
        one = what.removesuffix("s")
        if not self._asked[one]:
            raise HookError(f"The {what} of '{self.site}' was not asked for: pass {one}s=True to Trace.")
        if what not in self._kept:
            raise HookError(f"No gradient has reached '{self.site}': call backward() on a loss that depends on it.")
        if not self._kept[one].is_inference() and self._kept[one]._version != self._versions[one]:
            raise HookError(f"The {what} of '{self.site}' was changed in place after capture; pass clone=True.")
        if self._count > len(self._earlier) + 1:
            warnings.warn(f"'{self.site}' ran {self._count} times; this is the last: see calls='all'", stacklevel=3)
        return self._kept[what]


class Trace(Shown, _Readable):
    """Capture, and if wanted change, what passes through named modules while the body runs the model.

        with Trace(model, "transformer.h.5.mlp.c_proj", inputs=True, grads=True) as t:
            loss(model(ids).logits).backward()
        t.input, t.output, t.grad                     # [batch, tokens, d_ff], and twice [batch, tokens, d]

        with Trace(model, select(model, "transformer.h.*"), stop=True) as t:
            model(ids)
        {site: t[site].output for site in t}          # in the order of the forward pass

    - `sites`: one name or several. With one, `t.output` stands for `t[site].output`.
    - `inputs`, `outputs`, `grads`: what to keep. An input may be a keyword argument. Gradients are those at the output,
      and arrive also when backward runs after the body.
    - `edit`, `edit_input`, `edit_grad`: a function, or {site: function}, from the hidden tensor (and the site's name,
      if it needs a second argument) to a tensor of the same shape, dtype and device. Edits come before all other hooks.
    - `stop`: end the forward pass, and the body, once every site has run. The model must be given no cache.
    - `calls`: keep the "last" run of each site, or "all" as `t[site].calls`: one for each step of generate().
    - `when`: record the values "after_edit", with which the model continues, or "before_edit".
    - `positions`: keep only these tokens (dim 1). An int drops the dim; a slice, list or tensor does not.
    - `device`, `dtype`: of what is kept; moved or cast at once. `detach`: if False, the graph is kept.
    - `clone`: keep copies. Without it, reading a tensor that was changed in place since is an error.
    - `leaf`: cut the graph at the first site that runs. A site with nothing trainable before it is cut in any case.

    Raises HookError when the body ends normally and a site never ran. Runs of the model in other threads are ignored.
    """

    _lenient = False  # where no gradient can arrive: True continues without one, False raises HookError

    def __init__(
        self,
        model: nn.Module,
        sites: str | Iterable[str],
        inputs: bool = False,
        outputs: bool = True,
        grads: bool = False,
        edit: Changes = None,
        edit_input: Changes = None,
        edit_grad: Changes = None,
        stop: bool = False,
        calls: Literal["last", "all"] = "last",
        when: Literal["after_edit", "before_edit"] = "after_edit",
        positions: int | slice | Sequence[int] | Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        clone: bool = False,
        leaf: bool = False,
    ) -> None:
        if calls not in ("last", "all") or when not in ("after_edit", "before_edit"):
            raise HookError(f"calls={calls!r}, when={when!r}: give 'last' or 'all', and 'after_edit' or 'before_edit'.")
        self.sites = list(dict.fromkeys([sites] if isinstance(sites, str) else sites))
        if not self.sites:
            raise HookError("Trace was given no site: name one or several modules (select() finds them by pattern).")
        changes = {"edit": edit, "edit_input": edit_input, "edit_grad": edit_grad}
        self._edits = {option: _by_site(option, self.sites, change) for option, change in changes.items()}
        self._model, self._stop, self._keep_all = model, stop, calls == "all"
        self._asked = {"input": inputs, "output": outputs, "grad": grads}
        self._watched, self._leaf, self._record_early = grads or edit_grad is not None, leaf, when == "before_edit"
        self._detach = detach
        self._stored = partial(_stored, positions, device, dtype, detach, clone)
        self._thread: int | None = None  # that runs the body; None outside
        self._records: dict[str, Record] = {}

    def __enter__(self) -> "Trace":
        self._open()
        return self

    def _open(self) -> None:
        if self._thread is not None:
            raise HookError("This Trace is already open: make another one for a nested with.")
        modules = {site: hookable(self._model, site) for site in self.sites}
        self._records, self._first = {}, ""

        def refuse_cache(called: nn.Module, args: Args, kwargs: Kwargs) -> None:
            named = any(kwargs.get(name) is not None for name in ("past_key_values", "cache"))
            given = named or any(hasattr(x, "get_seq_length") for x in args)
            if given and called is self._model and self._thread == threading.get_ident():
                raise HookError("stop=True would leave the given cache half filled: pass use_cache=False and no cache.")

        with ExitStack() as hooks:
            if self._stop:
                hooks.callback(self._model.register_forward_pre_hook(refuse_cache, with_kwargs=True).remove)
            for site, module in modules.items():
                self._hook(site, module, hooks)
            self._hooks = hooks.pop_all()
        self._thread = threading.get_ident()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> bool | None:
        self._close()
        missing = ", ".join(f"'{site}'" for site in self.sites if site not in self._records)
        if kind is None and missing:
            raise HookError(f"Never ran inside the trace: {missing}. Run the model inside the body and its thread.")
        return isinstance(error, _StopForward) and error.args[0] is self

    def _close(self) -> None:
        self._thread = None
        self._hooks.close()

    def __getitem__(self, site: str) -> Record:
        if site not in self.sites:
            raise NameNotFound(f"'{site}' is not traced here: the sites are {', '.join(self.sites)}.")
        if site not in self._records:
            raise HookError(f"'{site}' has not run yet in this trace.")
        return self._records[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def _ipython_key_completions_(self) -> list[str]:
        return self.sites

    def _shown(self) -> tuple[str, list[list[str]]]:
        title = f"Trace of {len(self.sites)} site" + "s" * (len(self.sites) > 1)
        return f"{title}, open" if self._thread is not None else title, self._rows()

    def _rows(self) -> list[list[str]]:
        """What is shown of each site."""
        ran = self._records
        return [
            row_of(site, ran[site]._count, ran[site]._kept) if site in ran else row_of(site, 0, {})
            for site in self.sites
        ]

    def _record(self) -> Record:
        if len(self.sites) > 1:
            raise HookError(f"This trace has {len(self.sites)} sites: say which, as in t['{self.sites[0]}'].output.")
        return self[self.sites[0]]

    def _ran(self, record: Record) -> None:
        """Called when a site has run; for subclasses."""

    def _graded(self, record: Record) -> None:
        """Called when a gradient has arrived; for subclasses."""

    def _hook(self, site: str, module: nn.Module, hooks: ExitStack) -> None:
        """Register this site's hooks, and their removal on `hooks`.

        At most two hooks before the module and two after: the early one runs before all other hooks and edits, the late
        one runs after them. The late one records; with when="before_edit" the early one does.
        """
        running: list[Record] = []  # one for each call of the module that has begun and not ended
        edits = {option: each[site] for option, each in self._edits.items() if site in each}

        def ours(called: nn.Module) -> bool:
            """Whether this call is to be seen: of this module, while the body runs, in its thread."""
            if called is not module or self._thread is None:  # a deep copy of the model carries our hooks
                return False
            if torch._C._current_graph_task_id() != -1:
                raise HookError(f"'{site}' ran again during backward: turn activation checkpointing off.")
            return self._thread == threading.get_ident()

        def before(early: bool, called: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
            if not ours(called):
                return None
            # 1) begin a record
            if early:
                running.append(Record(site, self._asked, self._stored))
            # 2) record the input
            if early == self._record_early and self._asked["input"]:
                given = with_input(args, kwargs, partial(running[-1].keep, "input"), site)
                running[-1]._kept["inputs"] = _detached(given) if self._detach else given
            # 3) edit the input
            return with_input(args, kwargs, edits["edit_input"], site) if early and "edit_input" in edits else None

        def after(early: bool, called: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
            if not ours(called) or not running:  # not running: the trace was entered during the call
                return None
            # 1) record the output, and its gradient when that arrives
            if early == self._record_early and (self._asked["output"] or self._watched):
                h = hidden(output)
                h = self._watch(running[-1], h, edits.get("edit_grad")) if self._watched else h
                running[-1].keep("output", h)
                output = with_hidden(output, h)
            # 2) edit the output
            if early and "edit" in edits:
                output = with_hidden(output, edits["edit"](hidden(output)))
            # 3) end the record, and stop once every site has one
            if not early:
                self._file(running.pop())
                if self._stop and len(self._records) == len(self.sites):
                    raise _StopForward(self)
            return output

        def add(register: Callable[..., Any], hook: Callable[..., Any], early: bool) -> None:
            hooks.callback(register(partial(hook, early), prepend=early, with_kwargs=True).remove)

        # The early hook before and the late hook after are always there: they begin and end a record.
        recorded = self._asked["output"] or self._watched
        add(module.register_forward_pre_hook, before, True)
        if self._asked["input"] and not self._record_early:
            add(module.register_forward_pre_hook, before, False)
        if "edit" in edits or (recorded and self._record_early):
            add(module.register_forward_hook, after, True)
        add(module.register_forward_hook, after, False)

    def _file(self, record: Record) -> None:
        """Make `record` the site's latest, with the earlier ones behind it if all calls are kept."""
        if earlier := self._records.get(record.site):
            record._count += earlier._count
            record._earlier = earlier.calls if self._keep_all else []
        self._records[record.site] = record
        self._ran(record)

    def _watch(self, record: Record, h: Tensor, edit: Change | None) -> Tensor:
        """Hook the gradient at output `h`, and return the tensor with which the model continues.

        The hook is on the tensor, because a module's backward hook fails on keyword inputs and on in-place changes.
        """
        if self._lenient and not (h.requires_grad and torch.is_grad_enabled()):
            return h
        if not torch.is_grad_enabled() or not h.is_floating_point():
            why = f"its output is {h.dtype}" if torch.is_grad_enabled() else "gradients are off (no_grad or generate())"
            raise HookError(f"No gradient can reach '{record.site}': {why}. Turn them on, or trace without grads.")
        self._first = self._first or record.site
        if not h.requires_grad or (self._leaf and record.site == self._first):
            h = h.detach().requires_grad_().clone()  # the clone may be changed in place, a leaf may not

        def on_backward(g: Tensor) -> Tensor:
            # Autograd may hand out an expanded tensor, or one to several: only a copy may be changed in place.
            changed = edit(g.clone()) if edit else g
            record.keep("grad", g if self._record_early else changed)
            self._graded(record)
            return changed

        hooked: Any = h  # torch has no types for this call
        hooked.register_hook(on_backward)
        return h


TraceDict = Trace


def hookable(model: nn.Module, site: str) -> nn.Module:
    """The module at `site`. Raises HookError where hooks on it would be ignored or run twice."""
    module, parts = get_module(model, site), site.split(".") if site else []
    for depth, module in enumerate(accumulate(parts, getattr, initial=model)):
        name = ".".join(parts[:depth])
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise HookError(f"'{name}' is compiled and would ignore the hooks: trace and call the model before that.")
        if not (module.training and getattr(module, "gradient_checkpointing", False)):
            continue
        layer = next((c for c in type(module).__mro__ if c.__name__ == "GradientCheckpointingLayer"), None)
        # Before transformers 5.23 its __call__ ran again, not its forward, and with it the layer's own hooks.
        with_hooks = layer is not None and "__call__" in vars(layer)
        if layer is not None and (name != site or with_hooks):
            way = "call model.eval()" if with_hooks else f"trace '{name}' or call model.eval()"
            raise HookError(f"'{site}' runs twice under activation checkpointing: {way}.")
    return module


def _by_site(option: str, sites: list[str], changes: Changes) -> dict[str, Change]:
    """{site: a checked function (hidden) -> hidden}, from one function for all sites or from a mapping."""
    each = changes if isinstance(changes, Mapping) else dict.fromkeys(sites, changes) if changes else {}
    if unknown := [site for site in each if site not in sites]:
        raise NameNotFound(f"{option} names {unknown}, which are not among the sites: {', '.join(sites)}.")
    return {site: partial(checked(option, change), site=site) for site, change in each.items()}


def checked(option: str, change: Change) -> Change:
    """`change` as a function (hidden, site) -> hidden.

    It raises HookError if `change` returns no tensor, or one of another shape, dtype or device. `option`: its name in
    that message.
    """
    try:
        parameters = list(inspect.signature(change).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        parameters = []
    needs_site = sum(p.kind <= p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters) > 1

    def run(h: Tensor, site: str) -> Tensor:
        due = list(h.shape), h.dtype, str(h.device)
        changed = change(h, site) if needs_site else change(h)
        if not isinstance(changed, Tensor):
            raise HookError(
                f"{option} at '{site}' returned {type(changed).__name__}: return the changed tensor, always."
            )
        if (got := (list(changed.shape), changed.dtype, str(changed.device))) != due:
            raise HookError(f"{option} at '{site}' returned {got}: shape, dtype and device must stay {due}.")
        return changed

    return run


def _stored(positions: Any, device: Any, dtype: Any, detach: bool, clone: bool, site: str, tensor: Tensor) -> Tensor:
    """What is kept of `tensor`; it is cut and moved before anything is stored. The options are Trace's.

    - `positions`, `device`, `dtype`, `detach`, `clone`: as in Trace. `site`: named in errors.
    - `tensor`: [batch, tokens, d] where `positions` is given.
    """
    tensor = tensor.detach() if detach else tensor
    if positions is not None:
        # A float of two dims comes from a family that flattens batch and tokens: its dim 1 is features.
        if tensor.ndim < 2 + tensor.is_floating_point():
            raise HookError(f"positions pick on dim 1; '{site}' gives {list(tensor.shape)}: index what is kept.")
        try:
            tensor = tensor[:, positions]
        except IndexError as error:
            raise HookError(f"positions={positions} at '{site}' of shape {list(tensor.shape)}: {error}.") from error
    dtype = dtype if dtype and tensor.is_floating_point() else tensor.dtype
    # Positions are copied: a view would keep the whole tensor in memory.
    return tensor.to(device or tensor.device, dtype, copy=clone or positions is not None)
