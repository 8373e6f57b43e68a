"""Second moments C = E[k kᵀ] of the keys of a down-projection, over running text. k [d_ff] is its input.

    moment.py      SecondMoment: C with its count, its file and its health
    factored.py    Factored: C ready to solve with
    experts.py     the same for a mixture of experts: one block of C an expert, and why
    collect.py     one pass over the text for all asked layers, with a state that can be saved and gone on from
    cache.py       second_moments: from the cache, or collected once whatever the number of processes that ask
    reference.py   the .npz files of the ROME authors' code, read and written

On the command line: `python -m editkit.moments --help`.
"""

from editkit.moments.cache import cache_folder, second_moments
from editkit.moments.collect import packed_blocks
from editkit.moments.factored import Factored, Identity
from editkit.moments.moment import SecondMoment
from editkit.moments.reference import from_npz, to_npz

__all__ = [
    "Factored",
    "Identity",
    "SecondMoment",
    "cache_folder",
    "from_npz",
    "packed_blocks",
    "second_moments",
    "to_npz",
]
