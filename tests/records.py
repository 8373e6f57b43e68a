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
RECORDS = {
    "counterfact": COUNTERFACT,
    "counterfact_flat": COUNTERFACT_FLAT,
    "zsre": ZSRE,
    "knowedit": KNOWEDIT,
    "mquake": MQUAKE,
    "known": KNOWN,
}
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
}
