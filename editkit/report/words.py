"""What the report calls things: metrics, kinds of probe, settings; and which way is better."""

from dataclasses import dataclass

# Kinds of probe (editkit.data.cases, whose import brings torch) in the order of a page.
KINDS = {
    "rewrite": "rewrite",
    "paraphrase": "paraphrases",
    "unseen_paraphrase": "phrasings never seen",
    "neighborhood": "neighborhood (must stay)",
    "same_subject": "same subject, other relation (must stay)",
    "portability": "what follows",
    "multi_hop": "multi-hop",
    "attribute": "subjects that have the new object",
}

SHARE, DIFFERENCE, OTHER = "share", "difference", "other"


@dataclass(frozen=True)
class Meaning:
    """One line about a metric; `better`: +1 more is better, −1 less, 0 neither."""

    text: str
    better: int = 1
    unit: str = SHARE


# By PROTOCOL.NAME, then by NAME alone.
_MEANINGS = {
    "counterfact.ES": Meaning("rewrite prompts after which the new object is likelier than the old"),
    "counterfact.PS": Meaning("paraphrases after which the new object is likelier than the old"),
    "counterfact.NS": Meaning("neighborhood prompts after which the old object is still likelier"),
    "counterfact.S": Meaning("harmonic mean of ES, PS and NS"),
    "counterfact.EM": Meaning("mean of p(new) − p(old) after rewrite prompts", unit=DIFFERENCE),
    "counterfact.PM": Meaning("mean of p(new) − p(old) after paraphrases", unit=DIFFERENCE),
    "counterfact.NM": Meaning("mean of p(old) − p(new) after neighborhood prompts", unit=DIFFERENCE),
    "counterfact.GE": Meaning("entropy of n-grams in sampled text, bits: low where text repeats itself", unit=OTHER),
    "counterfact.RS": Meaning("TF-IDF cosine of sampled text with reference texts"),
    "counterfact.p_new": Meaning("probability of the new object after the rewrite prompt"),
    "counterfact.portability": Meaning("prompts one hop on whose answer follows from the new fact"),
    "zsre.efficacy": Meaning("tokens of the new answer that are the argmax, teacher-forced, rewrite prompts"),
    "zsre.paraphrase": Meaning("the same after paraphrases"),
    "zsre.specificity": Meaning("tokens of unrelated answers that are the argmax, teacher-forced"),
    "easyedit.reliability": Meaning("tokens of the new answer that are the argmax, teacher-forced"),
    "easyedit.generality": Meaning("the same after paraphrases"),
    "easyedit.locality": Meaning("argmax tokens of prompts whose answer must stay that are as they were"),
    "easyedit.portability": Meaning("teacher-forced tokens right one hop on"),
    "mquake.multi_hop": Meaning("multi-hop questions answered by free generation"),
    "retention.ES": Meaning("ES over all edits made so far"),
    "recent.ES": Meaning("ES over the last stretch of edits"),
    "untouched.NS": Meaning("NS over cases that were never edited"),
}
_BY_PROTOCOL = {
    "generation": Meaning("free greedy generation says the wanted answer (exact match)"),
    "retention": Meaning("over all edits made so far"),
    "recent": Meaning("over the last stretch of edits"),
    "untouched": Meaning("over cases that were never edited"),
}
_PATTERNS = (("kl", Meaning("nats", -1, OTHER)), ("perplexity", Meaning("on running text", -1, OTHER)))

PROTOCOLS = {
    "counterfact": "CounterFact (ROME): two answers compared by likelihood",
    "zsre": "zsRE: teacher-forced accuracy",
    "easyedit": "EasyEdit: teacher-forced accuracy and unchanged tokens",
    "mquake": "MQuAKE: multi-hop questions",
    "generation": "Free generation: exact match",
    "retention": "All edits so far",
    "recent": "The last stretch of edits",
    "untouched": "Cases never edited",
    "": "Others",
}


def meaning(name: str) -> Meaning:
    """What a metric (PROTOCOL.NAME) is; nothing is claimed of one that is not known here."""
    protocol, _, last = name.rpartition(".")
    if name in _MEANINGS:
        return _MEANINGS[name]
    same = _MEANINGS.get(f"counterfact.{last}")
    if protocol in _BY_PROTOCOL:
        about = _BY_PROTOCOL[protocol]
        return Meaning(f"{last} {about.text}" if same else about.text, 1, same.unit if same else about.unit)
    for part, found in _PATTERNS:
        if part in last.lower():
            return found
    return Meaning("", 0, OTHER)


def kind(name: str) -> str:
    return KINDS.get(name, name.replace("_", " "))
