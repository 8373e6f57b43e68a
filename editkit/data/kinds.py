"""The kinds of rows in cases.parquet, and what a page calls them. No torch, so that a report can read them."""

REWRITE, PARAPHRASE, UNSEEN = "rewrite", "paraphrase", "unseen_paraphrase"
NEIGHBORHOOD, SAME_SUBJECT, PORTABILITY = "neighborhood", "same_subject", "portability"
MULTI_HOP, ATTRIBUTE = "multi_hop", "attribute"
CONDITION = "condition"  # what the unedited model must know for a test to count (RippleEdits)
DISTRACTED = "distracted"  # neighborhood prompts with the new fact in front (CounterFact+)
# Of probes by template (data/templates/), each named as its template is.
NEGATION, FACT_CHECK, REVERSED, ALIAS = "negation", "fact_check", "reversed", "alias"
SECOND_LANGUAGE, REPEAT_OLD, DISTRACTING_CONTEXT = "second_language", "repeat_old", "distracting_context"
FROM_NEW, FROM_OLD = "from the new object", "from the old object"  # groups of reversed prompts
GENERATION, REFERENCE = "generation", "reference"  # sampled texts, and texts to compare them with
STAY = (NEIGHBORHOOD, SAME_SUBJECT)  # the kinds whose true answer must stay
TRUE_WANTED = (*STAY, DISTRACTED, REPEAT_OLD)  # the kinds whose right answer is the true one
OWN_ANSWERS = (PORTABILITY, FACT_CHECK, REVERSED)  # the kinds whose answers are other ones than the fact's
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
    NEGATION: "negation (the new object is wrong)",
    FACT_CHECK: "is it true that …?",
    REVERSED: "from the object to the subject",
    ALIAS: "another name of the subject",
    SECOND_LANGUAGE: "in another language",
    REPEAT_OLD: "told to repeat the old answer",
    DISTRACTING_CONTEXT: "a neighbor with the old object in front",
    GENERATION: "sampled text",
    REFERENCE: "reference text",
}


def heading(kind: str) -> str:
    """What a page calls a kind of row; a kind from outside keeps its name."""
    return HEADINGS.get(kind, kind.replace("_", " "))
