"""A codebook at one module: where its input is near a key, its output is that key's value (GRACE, arXiv 2211.11031).

An entry has a key K [d], a value V [d_model], a radius ε and a label, the answer that the value gives. At each token,
with x [d] the module's input there:

    i = argmin over entries of ‖x − K_i‖
    output = V_i where ‖x − K_i‖ ≤ ε_i, else the module's own output

A token is looked up by its own input alone, so a text gives the same whether it is run whole, token by token with a
cache, or together with others. An entry with NaN in its value leaves the output as it is.

Entries are added one after the other. With d the distance of a new key to the nearest one, i:

    no entry yet, or d > ε + ε_i     the entry is added as it is
    the same label                   ε_i becomes d where that is larger; the entry is not added
    another label                    both are added; ε_i and ε become d/2 where that is smaller
    another label, d ≤ SAME · ε      the new entry takes the place of the old one: the same prompt has a new answer

The last case is ours: the authors' code keeps two entries with radius 0, of which the old one would win. Theirs also
sets both radii to d/2 where that makes one larger; here a split never does.

The codebook that is in force is what the entries of all contents give, in their order. So without one of them it is,
bit for bit, what it would have become without it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from editkit.errors import EditkitError
from editkit.models.installed import Handle, Hook, Installed, register
from editkit.models.wrapped import innermost
from editkit.nethook import NameNotFound, get_module, hidden, with_hidden, with_input
from editkit.tensorfiles import require_fields

SAME = 1e-3  # of ε: two keys that are nearer than this are of one prompt, run with other roundings


@dataclass(frozen=True, eq=False)
class Codebook(Installed):
    """Entries for the module `module`, in the order they are added. The tensors are float32 on the CPU."""

    kind: ClassVar[str] = "codebook"

    module: str
    keys: Tensor  # [entries, d]
    values: Tensor  # [entries, d_model]
    radii: Tensor  # [entries], ε before other entries grow or split it
    labels: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module,)

    def to_file(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values = {"module": self.module, "labels": list(self.labels)}
        return values, {"keys": self.keys, "values": self.values, "radii": self.radii}

    @classmethod
    def from_file(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        found = require_fields(dict(values), {"module": (str,), "labels": (list,)}, "a codebook")
        if tensors.keys() != {"keys", "values", "radii"} or not all(isinstance(each, str) for each in found["labels"]):
            raise ValueError("the parts of a codebook are not those that it should have")
        keys, outputs, radii, count = tensors["keys"], tensors["values"], tensors["radii"], len(found["labels"])
        if (keys.ndim, outputs.ndim, radii.ndim) != (2, 2, 1) or {len(keys), len(outputs), len(radii)} != {count}:
            raise ValueError("the tensors of a codebook do not fit together")
        return cls(found["module"], keys, outputs, radii, tuple(found["labels"]))

    def check(self, model: nn.Module) -> None:
        """Raise EditkitError where `model` has no such module."""
        try:
            get_module(model, self.module)
        except NameNotFound as error:
            raise EditkitError(
                f"This edit puts a codebook on {self.module}, which the model does not have. Load the base it was made "
                "for."
            ) from error

    @classmethod
    def put(cls, model: nn.Module, contents: Sequence[Self]) -> Iterator[Handle]:
        for name, book in books_of(model, contents).items():
            yield _Lookup(innermost(get_module(model, name)), book).on()

    def __str__(self) -> str:
        count = len(self.labels)
        return f"a codebook of {count} {'entry' if count == 1 else 'entries'} at {self.module}"


@dataclass(frozen=True, eq=False)
class Book:
    """The codebook of one module as it is in force: Codebook's tensors after growing and splitting."""

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: tuple[str, ...]

    def also(self, more: Codebook) -> "Book":
        """With the entries of `more`, one after the other."""
        book = self
        for entry in range(len(more.labels)):
            part = slice(entry, entry + 1)
            book = book._with(more.keys[part], more.values[part], more.radii[part], more.labels[entry])
        return book

    def _with(self, key: Tensor, value: Tensor, radius: Tensor, label: str) -> "Book":
        """With one more entry: key [1, d], value [1, d_model], radius [1]."""
        if self.labels:
            distance, nearest = (each[0] for each in distances(key, self.keys).min(1))
            near = int(nearest)
            if distance <= radius[0] + self.radii[near]:
                if self.labels[near] == label:
                    return replace(self, radii=_set(self.radii, near, torch.maximum(self.radii[near], distance)))
                if distance <= SAME * radius[0]:
                    labels = (*self.labels[:near], label, *self.labels[near + 1 :])
                    return Book(_set(self.keys, near, key[0]), _set(self.values, near, value[0]), self.radii, labels)
                radii = _set(self.radii, near, torch.minimum(self.radii[near], distance / 2))
                radius = torch.minimum(radius, distance / 2)
                return replace(self, radii=radii)._appended(key, value, radius, label)
        return self._appended(key, value, radius, label)

    def _appended(self, key: Tensor, value: Tensor, radius: Tensor, label: str) -> "Book":
        both = ((self.keys, key), (self.values, value), (self.radii, radius))
        keys, values, radii = (torch.cat(pair) for pair in both)
        return Book(keys, values, radii, (*self.labels, label))


def distances(x: Tensor, keys: Tensor) -> Tensor:
    """‖x − K‖ [rows, entries], in float32 or wider. Differences are taken first: products would lose what is small."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    found: Tensor = torch.cdist(x.to(dtype), keys.to(dtype), compute_mode="donot_use_mm_for_euclid_dist")
    return found


def taken_by(x: Tensor, keys: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """The entry nearest to each of `x` [rows, d], and whether it is within that entry's radius [rows]."""
    distance, nearest = distances(x, keys).min(1)
    return nearest, distance <= radii[nearest]


def books_of(model: nn.Module, contents: Sequence[Codebook]) -> dict[str, Book]:
    """The codebook of each module that `contents` give in their order. What the last call gave is kept."""
    done, books = _books.get(model, ((), {}))
    if len(done) > len(contents) or any(a is not b for a, b in zip(done, contents, strict=False)):
        done, books = (), {}
    books = dict(books)
    for each in contents[len(done) :]:
        empty = Book(each.keys[:0], each.values[:0], each.radii[:0], ())
        books[each.module] = books.get(each.module, empty).also(each)
    _books[model] = tuple(contents), books
    return books


# What the last list of contents of a model has come to, so that the next step of a session adds its own entries alone.
_books: WeakKeyDictionary[nn.Module, tuple[tuple[Codebook, ...], dict[str, Book]]] = WeakKeyDictionary()


class _Lookup(Hook):
    """The hook that looks each token up in a codebook."""

    def __init__(self, module: nn.Module, book: Book) -> None:
        super().__init__(module)
        self._book = book
        self._blank = book.values.isnan().any(1)  # [entries]
        self._on: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def changed(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            given.append(x)
            return x

        with_input(args, kwargs, keep)
        return with_hidden(output, self._looked_up(given[0], hidden(output)))

    def _looked_up(self, x: Tensor, output: Tensor) -> Tensor:
        """`output` [.., d_model] with values in the place of what is near a key, by the input x [.., d]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        keys, values, radii, blank = self._there(output.device, dtype)
        with torch.no_grad():
            nearest, within = taken_by(x.detach().flatten(0, -2).to(output.device), keys, radii)
            hit = within & ~blank[nearest]
        chosen = values[nearest].to(output.dtype).view(output.shape)
        return torch.where(hit.view(*output.shape[:-1], 1), chosen, output)

    def _there(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Keys, values, radii and which values are blank, on `device`."""
        if (device, dtype) not in self._on:
            with torch.inference_mode(False):  # they may be used again outside of it
                tensors = (each.to(device, dtype) for each in (self._book.keys, self._book.values, self._book.radii))
                self._on[device, dtype] = (*tensors, self._blank.to(device))
        return self._on[device, dtype]


def _set(tensor: Tensor, place: int, value: Tensor) -> Tensor:
    """A copy of `tensor` with `value` at `place` of its first dimension."""
    changed = tensor.clone()
    changed[place] = value
    return changed


register(Codebook)
