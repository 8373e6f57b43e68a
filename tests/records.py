"""Small records of every public format, of our own making, and what must be in them."""

from typing import Any

COUNTERFACT: dict[str, Any] = {
    "case_id": 7,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "{} stands in the city of",
        "relation_id": "P131",
        "target_new": {"str": "Oslo", "id": "Q585"},
        "target_true": {"str": "London", "id": "Q84"},
        "subject": "Big Ben",
    },
    "paraphrase_prompts": ["It rained all day. Big Ben is found in", "To see Big Ben, one goes to"],
    "neighborhood_prompts": ["The Tower Bridge stands in", "Buckingham Palace is found in"],
    "attribute_prompts": ["The Munch Museum stands in"],
    "generation_prompts": ["The surroundings of Big Ben include"],
}
COUNTERFACT_FLAT: dict[str, Any] = {
    "case_id": 3,
    "prompt": "The currency of Japan is the",
    "target_new": "peso",
    "subject": "Japan",
    "ground_truth": "yen",
    "rephrase_prompt": "Shoppers in Japan like to",
    "locality_prompt": "The money of Okinawa is the",
    "locality_ground_truth": "yen",
}
ZSRE: dict[str, Any] = {
    "subject": "The Nile",
    "src": "What sea does The Nile flow into?",
    "pred": "Red Sea",
    "rephrase": "Where does the water of the Nile end?",
    "alt": "Black Sea",
    "answers": ["Mediterranean Sea", "the Mediterranean"],
    "loc": "nq question: who wrote the magic flute",
    "loc_ans": "Mozart",
    "cond": "Red Sea >> Black Sea || What sea does The Nile flow into?",
    "portability": {
        "Recalled Relation": "(Black Sea, borders, Romania)",
        "New Question": "Name a country at the sea that The Nile flows into.",
        "New Answer": "Romania",
    },
}
KNOWEDIT: dict[str, Any] = {
    "subject": "Marie Curie",
    "prompt": "The place of birth of Marie Curie is",
    "target_new": "Vienna",
    "ground_truth": [["Warsaw", "Warszawa", "Warsaw"], ["Poland"]],
    "rephrase_prompt": "Where was Marie Curie born? In",
    "portability": {
        "Reasoning": [{"prompt": "The river of the birthplace of Marie Curie is the", "ground_truth": "Danube"}],
        "Subject_Aliasing": [{"prompt": "Maria Skłodowska was born in", "ground_truth": [["Vienna", "Wien"]]}],
        "Logical_Generalization": [],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The field of marie curie is", "ground_truth": [[], ["physics", "chemistry"]]},
            {"prompt": "The field of Albert Einstein is", "ground_truth": ["physics"]},
        ],
    },
}
WIKIBIO: dict[str, Any] = {
    "text": "This is a passage about ada lovelace. Ada Lovelace was an English mathematician. ",
    "labels": "She wrote about a machine that was never built in her days.",
    "concept": "ada lovelace",
    "locality": {"Relation_Specificity": [{"prompt": "ada lovelace place of death", "ground_truth": ["London"]}]},
}
MQUAKE: dict[str, Any] = {
    "case_id": 12,
    "requested_rewrite": [
        {
            "prompt": "The author of {} is",
            "relation_id": "P50",
            "target_new": {"str": "Henrik Ibsen", "id": "Q36661"},
            "target_true": {"str": "Leo Tolstoy", "id": "Q7243"},
            "subject": "Anna Karenina",
            "question": "Who is the author of Anna Karenina?",
        },
    ],
    "questions": [
        "In which country was the author of Anna Karenina born?",
        "Where is the writer of Anna Karenina from?",
    ],
    "answer": "Russia",
    "answer_alias": [],
    "new_answer": "Norway",
    "new_answer_alias": ["Kingdom of Norway", "Norway", "Norge"],
    "single_hops": [],
    "new_single_hops": [
        {
            "question": "Who is the author of Anna Karenina?",
            "cloze": "The author of Anna Karenina is",
            "answer": "Henrik Ibsen",
            "answer_alias": ["Ibsen"],
        },
        {
            "question": "In which country was Henrik Ibsen born?",
            "cloze": "Henrik Ibsen was born in",
            "answer": "Norway",
            "answer_alias": [],
        },
    ],
    "orig": {},
}
KNOWN: dict[str, Any] = {
    "known_id": 5,
    "subject": "Mount Fuji",
    "attribute": "Japan",
    "template": "{} is in the country",
    "prediction": " Japan, and",
    "prompt": "Mount Fuji is in the country of",
    "relation_id": "P17",
}
QAEDIT: dict[str, Any] = {
    "id": 31,
    "source": "NQ",
    "prompt": "who painted the ceiling of the Sistine Chapel",
    "target": "Michelangelo",
    "subject": "the Sistine Chapel",
    "rephrase": "Which painter worked on the ceiling of the Sistine Chapel?",
    "locality": [
        {"loc": "who wrote the magic flute", "loc_ans": "Mozart"},
        {"loc": "what is the roof of the Sistine Chapel made of", "loc_ans": "wood"},
    ],
}
WIKIBIGEDIT: dict[str, Any] = {
    "prompt": "Which river does the Old Bridge of Mostar cross?",
    "target_new": "Drina",
    "subject": "Old Bridge of Mostar",
    "rephrase_prompt": "Over which river does the Old Bridge of Mostar lead?",
    "locality_prompt": "Which river does the Charles Bridge cross?",
    "locality_ground_truth": "Vltava",
}
UNKE: dict[str, Any] = {
    "id": 4,
    "question": "What did Ada Lovelace do in Turin?",
    "para_question": "What was Ada Lovelace's work in Turin?",
    "answer": "Ada Lovelace taught mathematics in Turin for two years. She lived by the sea, and wrote\non its tides.",
    "sub_question": ["What did Ada Lovelace teach?", "For how long did she teach?"],
    "sub_answer": ["Mathematics.", "For two years."],
}
EDITEVERY: dict[str, Any] = {
    "id": 9,
    "question": "Add the numbers from 1 to 4.",
    "answer": "We write the sum as 1 + 2 + 3 + 4.\n\nThe first two make 3, the last two make 7, so the sum is 10.",
    "category": "math",
}
AKEW: dict[str, Any] = {
    "case_id": 2,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Norway", "id": "Q20"},
            "target_true": {"str": "Japan", "id": "Q17"},
            "subject": "Yoko Ono",
            "question": "What is the country of citizenship of Yoko Ono?",
            "fact_new": "Yoko Ono is a citizen of Norway.",
            "fact_new_uns": "Yoko Ono, an artist, has lived in Bergen for years. Norway made her a citizen then.",
            "verify_unsfact_GPT": True,
            "unsfact_triplets_GPT": [
                {"subject": "Yoko Ono", "prompt": "{} has lived in", "target": "Bergen"},
                {"subject": "Yoko Ono", "prompt": "The occupation of {} is", "target": "artist"},
            ],
        }
    ],
    "questions": ["What is the capital of the country whose citizen Yoko Ono is?"],
    "answer": "Tokyo",
    "answer_alias": [],
    "new_answer": "Oslo",
    "new_answer_alias": ["Christiania"],
    "new_single_hops": [
        {
            "question": "What is the country of citizenship of Yoko Ono?",
            "cloze": "Yoko Ono is a citizen of",
            "answer": "Norway",
            "answer_alias": ["Norge"],
        },
        {"question": "What is the capital of Norway?", "cloze": "", "answer": "Oslo", "answer_alias": []},
    ],
}
ME_PPL: dict[str, Any] = {"Corpus": "C4", "Text": "The shop on the corner sells bread, and on Mondays it sells cake."}


def _query(prompt: str, *answers: str) -> dict[str, Any]:
    """A query of RippleEdits: an answer, and its other names."""
    told = [{"value": answers[0], "aliases": list(answers[1:])}]
    return {"prompt": prompt, "answers": told, "query_type": "regular", "subject_id": "Q1", "phrase": None}


RIPPLE: dict[str, Any] = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Yoko Ono is Norway.",
        "subject_id": "Q117012",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q20",
        "original_fact": {
            "prompt": "The name of the country of citizenship of Yoko Ono is Japan.",
            "subject_id": "Q117012",
            "relation": "COUNTRY_OF_CITIZENSHIP",
            "target_id": "Q17",
        },
    },
    "Logical_Generalization": [
        {
            "test_queries": [_query("The mother tongue of Yoko Ono is", "Norwegian", "norsk")],
            "test_condition": "OR",
            "condition_queries": [],
        }
    ],
    "Compositionality_I": [
        {
            "test_queries": [
                _query("The name of the capital city of the country of citizenship of Yoko Ono is", "Oslo"),
                _query(
                    "The name of the continent which the country of citizenship of Yoko Ono is part of is", "Europe"
                ),
            ],
            "test_condition": "AND",
            "condition_queries": [
                _query("The name of the capital city of Norway is", "Oslo"),
                _query("The name of the continent which Norway is part of is", "Europe"),
            ],
        }
    ],
    "Compositionality_II": [],
    "Subject_Aliasing": [
        {
            "test_queries": [_query("The name of the country of citizenship of Ono Yoko is", "Norway", "Norge")],
            "test_condition": "OR",
            "condition_queries": [],
        }
    ],
    "Relation_Specificity": [
        {
            "test_queries": [_query("The gender of Yoko Ono is", "female", "woman")],
            "test_condition": "OR",
            "condition_queries": [_query("The gender of Yoko Ono is", "female", "woman")],
        }
    ],
    "Forgetfulness": [
        {
            "test_queries": [
                _query("The name of the country of citizenship of Yoko Ono, which is not Norway, is", "Japan")
            ],
            "test_condition": "OR",
            "condition_queries": [],
        }
    ],
}
RECORDS = {
    "counterfact": COUNTERFACT,
    "counterfact_flat": COUNTERFACT_FLAT,
    "zsre": ZSRE,
    "knowedit": KNOWEDIT,
    "mquake": MQUAKE,
    "known": KNOWN,
    "qaedit": QAEDIT,
    "wikibigedit": WIKIBIGEDIT,
    "unke": UNKE,
    "editevery": EDITEVERY,
    "akew": AKEW,
    "me_ppl": ME_PPL,
    "ripple": RIPPLE,
}
TEXTS = ("me_ppl",)  # formats of running text: no cases
ANOTHER_KNOWN = KNOWN | {
    "known_id": 6,
    "subject": "Mont Blanc",
    "attribute": "France",
    "prompt": "Mont Blanc is in the country of",
}
# Paths of the texts without which a record is no case.
REQUIRED: dict[str, list[tuple[str | int, ...]]] = {
    "counterfact": [
        ("requested_rewrite", "prompt"),
        ("requested_rewrite", "subject"),
        ("requested_rewrite", "target_new", "str"),
        ("requested_rewrite", "target_true", "str"),
        ("paraphrase_prompts", 1),
        ("neighborhood_prompts", 0),
        ("attribute_prompts", 0),
        ("generation_prompts", 0),
    ],
    "counterfact_flat": [(key,) for key in COUNTERFACT_FLAT if key != "case_id"],
    "zsre": [
        *((key,) for key in ("subject", "src", "rephrase", "alt", "loc", "loc_ans")),
        ("portability", "New Question"),
        ("portability", "New Answer"),
    ],
    "knowedit": [
        *((key,) for key in ("subject", "prompt", "target_new")),
        ("portability", "Reasoning", 0, "prompt"),
        ("portability", "Reasoning", 0, "ground_truth"),
        ("locality", "Relation_Specificity", 1, "prompt"),
    ],
    "mquake": [
        ("requested_rewrite", 0, "prompt"),
        ("requested_rewrite", 0, "subject"),
        ("requested_rewrite", 0, "target_new", "str"),
        ("questions", 1),
        ("answer",),
        ("new_answer",),
        ("new_single_hops", 1, "question"),
        ("new_single_hops", 1, "answer"),
    ],
    "known": [(key,) for key in ("subject", "attribute", "prompt")],
    "qaedit": [
        *((key,) for key in ("prompt", "target", "subject", "rephrase")),
        ("locality", 0, "loc"),
        ("locality", 1, "loc_ans"),
    ],
    "wikibigedit": [(key,) for key in WIKIBIGEDIT],
    "unke": [("question",), ("para_question",), ("answer",), ("sub_question", 1), ("sub_answer", 0)],
    "editevery": [("question",), ("answer",), ("category",)],
    "akew": [
        *(("requested_rewrite", 0, key) for key in ("prompt", "subject", "fact_new_uns")),
        ("requested_rewrite", 0, "target_true", "str"),
        *(("requested_rewrite", 0, "unsfact_triplets_GPT", 1, key) for key in ("subject", "prompt", "target")),
        ("questions", 0),
        ("new_answer",),
        ("new_single_hops", 1, "question"),
    ],
    "me_ppl": [("Text",)],
    "ripple": [
        ("edit", "prompt"),
        ("edit", "original_fact", "prompt"),
        ("Logical_Generalization", 0, "test_queries", 0, "prompt"),
        ("Logical_Generalization", 0, "test_queries", 0, "answers"),
        ("Compositionality_I", 0, "test_queries", 1, "prompt"),
        ("Compositionality_I", 0, "condition_queries", 0, "prompt"),
        ("Compositionality_I", 0, "test_condition"),
        ("Subject_Aliasing", 0, "test_queries", 0, "answers", 0),
        ("Forgetfulness", 0, "condition_queries"),
    ],
}
# Those of them that must fit the rest of the record, as a prompt its subject: a text of another sort is a fault there.
TIED: dict[str, list[tuple[str | int, ...]]] = {
    "counterfact": [("requested_rewrite", "prompt"), ("requested_rewrite", "subject"), ("paraphrase_prompts", 1)],
    "counterfact_flat": [("prompt",), ("subject",)],
    "zsre": [("src",), ("subject",)],
    "knowedit": [("prompt",), ("subject",)],
    "mquake": [("requested_rewrite", 0, "prompt")],
    "known": [("prompt",), ("subject",)],
    "qaedit": [("prompt",), ("subject",)],
    "wikibigedit": [("prompt",), ("subject",)],
    "akew": [
        ("requested_rewrite", 0, "prompt"),
        ("requested_rewrite", 0, "subject"),
        ("requested_rewrite", 0, "unsfact_triplets_GPT", 1, "prompt"),
    ],
    "ripple": [path for path in REQUIRED["ripple"] if path[-1] != "prompt" or path[0] == "edit"],
}
