"""What the report calls things: metrics, protocols, kinds of probe; and which way is better."""

from dataclasses import dataclass, replace

# Kinds of rows in cases.parquet (editkit.data.cases and metrics, whose import brings torch) in the order of a page.
KINDS = {
    "rewrite": "rewrite",
    "paraphrase": "paraphrases",
    "unseen_paraphrase": "phrasings never seen",
    "neighborhood": "neighborhood (must stay)",
    "distracted": "neighborhood, new fact in front (must stay)",
    "same_subject": "same subject, other relation (must stay)",
    "portability": "what follows",
    "multi_hop": "multi-hop",
    "attribute": "subjects that have the new object",
    "generation": "sampled text",
}

SHARE, DIFFERENCE, OTHER = "share", "difference", "other"


@dataclass(frozen=True)
class Meaning:
    """One line about a metric; `better`: +1 more is better, −1 less, 0 neither is claimed."""

    text: str
    better: int = 1
    unit: str = SHARE


# By PROTOCOL.NAME; the definitions are at the head of each file of editkit/metrics.
_MEANINGS = {
    "counterfact.ES": Meaning("rewrite prompts after which the new object is likelier than the old"),
    "counterfact.PS": Meaning("paraphrases after which the new object is likelier than the old"),
    "counterfact.NS": Meaning("neighborhood prompts after which the old object is still likelier"),
    "counterfact.S": Meaning("harmonic mean of ES, PS and NS"),
    "counterfact.EM": Meaning("mean of p(new) − p(old), a token, after rewrite prompts", unit=DIFFERENCE),
    "counterfact.PM": Meaning("mean of p(new) − p(old) after paraphrases", unit=DIFFERENCE),
    "counterfact.NM": Meaning("mean of p(old) − p(new) after neighborhood prompts", unit=DIFFERENCE),
    "counterfact.EA": Meaning("rewrite prompts with every token of the new object the argmax"),
    "counterfact.PA": Meaning("paraphrases with every token of the new object the argmax"),
    "counterfact.NA": Meaning("neighborhood prompts with every token of the old object the argmax"),
    "counterfact.NS_distracted": Meaning("NS with the new fact put in front of the prompt (CounterFact+)"),
    "counterfact.unseen_PS": Meaning("PS of phrasings that the model has never seen"),
    "counterfact.attribute": Meaning("p(new) after prompts whose subjects have the new object already", 0),
    "counterfact.same_subject": Meaning("the subject's other answers still said, of those said before"),
    "counterfact.portability": Meaning("prompts one hop on, known before, whose new answer is likelier"),
    "counterfact.GE": Meaning("entropy of n-grams in sampled text, bits: low where text repeats itself", unit=OTHER),
    "counterfact.RS": Meaning("TF-IDF cosine of sampled text with reference texts"),
    "counterfact.p_new": Meaning("probability of the new object after the rewrite prompt"),
    "zsre.efficacy": Meaning("tokens of the new answer that are the argmax, rewrite prompts"),
    "zsre.paraphrase": Meaning("the same after paraphrases"),
    "zsre.specificity": Meaning("tokens of the old answer that are the argmax, neighborhood prompts"),
    "easyedit.reliability": Meaning("tokens of the new answer that are the argmax, rewrite prompts"),
    "easyedit.generality": Meaning("the same after paraphrases"),
    "easyedit.locality": Meaning("argmax tokens of prompts whose answer must stay that are as they were"),
    "easyedit.portability": Meaning("tokens of the answer that follows that are the argmax"),
    "mquake.multi_hop": Meaning("cases with a multi-hop question answered in free generation"),
    "mquake.hops": Meaning("single hops answered in free generation"),
    "mquake.instance": Meaning("cases with every single hop answered in free generation"),
}
_ANY_GENERATION = Meaning("free greedy generation begins with the wanted answer")
_LESS = {"kl": Meaning("nats", -1, OTHER), "perplexity": Meaning("on running text", -1, OTHER)}

# Which cases a lifelong run asks at each point.
ASKED = {
    "retention": "edits so far",
    "recent": "edits since the last point",
    "untouched": "never edited",
}
_PROTOCOLS = {
    "counterfact": "CounterFact (ROME): two answers compared by likelihood",
    "zsre": "zsRE: teacher-forced accuracy",
    "easyedit": "EasyEdit: teacher-forced accuracy and unchanged tokens",
    "mquake": "MQuAKE: multi-hop questions",
    "generation": "Free generation: exact match",
    "": "Others",
}


def parts(name: str) -> tuple[str, str]:
    """(who was asked, PROTOCOL.NAME): ("retention", "counterfact.ES"); ("", …) outside lifelong runs."""
    first, _, rest = name.partition(".")
    return (first, rest) if first in ASKED and rest else ("", name)


def short(name: str) -> str:
    """A metric's name without its protocol where that is CounterFact's, the most used."""
    asked, rest = parts(name)
    rest = rest.removeprefix("counterfact.")
    return f"{rest}, {ASKED[asked]}" if asked else rest


def meaning(name: str) -> Meaning:
    """What a metric is; nothing is claimed of one that is not known here."""
    rest = parts(name)[1]
    for known in (rest, f"counterfact.{rest}"):
        if known in _MEANINGS:
            return _MEANINGS[known]
    if rest.startswith("easyedit."):  # KnowEdit's parts: easyedit.portability_Reasoning
        whole, _, part = rest.partition("_")
        return replace(_MEANINGS[whole], text=part.replace("_", " ")) if whole in _MEANINGS else Meaning("", 0, OTHER)
    if rest.startswith("generation."):
        return _ANY_GENERATION
    return next((found for part, found in _LESS.items() if part in rest.lower()), Meaning("", 0, OTHER))


def protocol(name: str) -> str:
    """A protocol's heading; in a lifelong run, with who was asked."""
    asked, rest = parts(f"{name}.")
    title = _PROTOCOLS.get(rest.rstrip("."), rest.rstrip("."))
    return f"{title} · {ASKED[asked]}" if asked else title


def kind(name: str) -> str:
    return KINDS.get(name, name.replace("_", " "))


# What a trace puts back.
PLACES = {
    "state": "state",
    "mlp": "MLP outputs",
    "attention": "attention outputs",
    "severed_mlp": "state, later MLPs severed",
    "severed_attention": "state, later attention severed",
}


def place_kind(name: str, window: int) -> str:
    """What is put back, with the blocks that are put back together."""
    title = PLACES.get(name, name.replace("_", " "))
    return f"{title}, window of {window}" if name in ("mlp", "attention") and window > 1 else title
