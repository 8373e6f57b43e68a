"""The kinds of rows in cases.parquet, and what a page calls them. No torch, so that a report can read them."""

REWRITE, PARAPHRASE, UNSEEN = "rewrite", "paraphrase", "unseen_paraphrase"
NEIGHBORHOOD, SAME_SUBJECT, PORTABILITY = "neighborhood", "same_subject", "portability"
MULTI_HOP, ATTRIBUTE = "multi_hop", "attribute"
CONDITION = "condition"  # what the unedited model must know for a test to count (RippleEdits)
DISTRACTED = "distracted"  # neighborhood prompts with the new fact in front (CounterFact+)
GENERATION, REFERENCE = "generation", "reference"  # sampled texts, and texts to compare them with
STAY = (NEIGHBORHOOD, SAME_SUBJECT)  # the kinds whose true answer must stay
HOP = "hop"  # group of the single steps of a multi-hop question (MQuAKE), of kind portability
SUB_QUESTION = "sub_question"  # group of questions about parts of a long answer (UnKE), of kind portability

# In the order of a page.
HEADINGS = {
    REWRITE: "rewrite",
    PARAPHRASE: "paraphrases",
    UNSEEN: "paraphrases in phrasings never seen in training",
    NEIGHBORHOOD: "neighborhood (must stay)",
    DISTRACTED: "neighborhood, new fact in front (must stay)",
    SAME_SUBJECT: "same subject, other relation (must stay)",
    PORTABILITY: "what follows from the new fact",
    MULTI_HOP: "multi-hop questions",
    ATTRIBUTE: "subjects that have the new object already",
    CONDITION: "what must be known before the edit",
    GENERATION: "sampled text",
    REFERENCE: "reference text",
}


def heading(kind: str) -> str:
    """What a page calls a kind of row; a kind from outside keeps its name."""
    return HEADINGS.get(kind, kind.replace("_", " "))
