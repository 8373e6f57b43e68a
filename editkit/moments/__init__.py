"""Second moments C = E[k kᵀ] of the keys of a down-projection, over running text. k [d_ff] is its input.

    moment.py      SecondMoment: C with its count, its file and its health
    factored.py    Factored: C ready to solve with
    amount.py      keys_wanted: how many keys, where moments.tokens does not say
    experts.py     the same for a mixture of experts: one block of C an expert, and why
    collect.py     one pass over the text for all asked layers, with a state that can be saved and gone on from
    shards.py      the same pass shared between processes, by torchrun or in an array of jobs
    group.py       what the processes of torchrun tell each other
    cache.py       second_moments: from the cache, or collected once whatever the number of processes that ask
    reference.py   the .npz files of the ROME authors' code, read and written

On the command line: `python -m editkit.moments --help`.
"""

from editkit.moments.amount import keys_wanted, resolved
from editkit.moments.cache import cache_folder, second_moments
from editkit.moments.collect import Share, packed_blocks
from editkit.moments.factored import Factored, Identity
from editkit.moments.moment import SecondMoment
from editkit.moments.reference import from_npz, to_npz
from editkit.moments.shards import collect_share, collect_together

__all__ = [
    "Factored",
    "Identity",
    "SecondMoment",
    "Share",
    "cache_folder",
    "collect_share",
    "collect_together",
    "from_npz",
    "keys_wanted",
    "packed_blocks",
    "resolved",
    "second_moments",
    "to_npz",
]
