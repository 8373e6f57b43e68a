"""ME-PPL (arXiv 2402.09656): texts of seven corpora, whose perplexity warns that edits have broken a model.

    {"Corpus": "C4", "Text": ...}

There is no fact in them to edit. They are running text, and so measured on: task=lifelong task.text=me_ppl:FILE. The
source's figure is the mean of the texts' perplexities, each by itself; `drift.perplexity` is of the tokens of all
texts, joined to blocks, so compare it before and after, not with the paper's.
"""

from editkit.data.fields import Raw
from editkit.data.formats import register


def me_ppl(raw: Raw) -> str:
    """The text of one record. Raises BadField."""
    return raw.text("Text")


register("me_ppl", text=me_ppl, marks=(("Corpus", "Text"),))
