"""Files of our own in the formats of the field, laid out as the real ones beside the checkout are: facts of the atlas.

`write(folder)` makes counterfact.json, counterfact_flat.json, zsre.json, knowedit/, mquake.json, known_1000.json and
protocols/; how many records each has is in COUNTS. Nothing is copied from the real files: their field names and nesting
are kept.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from editkit.corpora import AtlasFact, load_atlas

Record = dict[str, Any]
MANY = 12  # records a file

# By (data format, file).
COUNTS = {
    ("counterfact", "counterfact.json"): MANY,
    ("counterfact_flat", "counterfact_flat.json"): MANY,
    ("zsre", "zsre.json"): MANY,
    ("zsre", "knowedit/zsre.json"): MANY,
    ("knowedit", "knowedit"): 4 * MANY,
    ("knowedit", "knowedit/wikibio.json"): MANY,
    ("mquake", "mquake.json"): MANY,
    ("known", "known_1000.json"): MANY,
    ("qaedit", "protocols/qaedit.json"): MANY,
    ("wikibigedit", "protocols/locft_wikibigedit_3k.json"): MANY,
    ("wikibigedit", "protocols/locft_counterfact_3k.json"): MANY,
    ("zsre", "protocols/locft_zsre_3k.json"): MANY,
    ("unke", "protocols/unke.json"): MANY,
    ("editevery", "protocols/editevery.json"): MANY,
    ("akew", "protocols/akew_mquake_cf.json"): MANY,
    ("me_ppl", "protocols/me_ppl.json"): MANY,
}


@cache
def capitals() -> list[AtlasFact]:
    """MANY facts country → capital, each with another capital."""
    return list({fact.object: fact for fact in load_atlas().facts if fact.relation == "country_capital"}.values())[
        :MANY
    ]


def write(folder: Path) -> Path:
    """Write every file under `folder`; returns it."""
    makers = {
        "counterfact": counterfact,
        "counterfact_flat": counterfact_flat,
        "zsre": zsre,
        "knowedit/zsre": knowedit_zsre,
        "knowedit/wiki_recent": wiki_recent,
        "knowedit/wiki_counterfact": wiki_counterfact,
        "knowedit/wikibio": wikibio,
        "mquake": mquake,
        "known_1000": known,
        "protocols/qaedit": qaedit,
        "protocols/locft_wikibigedit_3k": wikibigedit,
        "protocols/locft_counterfact_3k": locft_counterfact,
        "protocols/locft_zsre_3k": locft_zsre,
        "protocols/unke": unke,
        "protocols/editevery": editevery,
        "protocols/akew_mquake_cf": akew,
        "protocols/me_ppl": me_ppl,
    }
    for name in ("knowedit", "protocols"):
        (folder / name).mkdir(parents=True)
    facts = capitals()
    for name, make in makers.items():
        others = facts[1:] + facts[:1]  # whose capital is the new answer, and who is the neighbour
        records = [make(i, fact, other) for i, (fact, other) in enumerate(zip(facts, others, strict=True))]
        (folder / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder


def _rewrite(fact: AtlasFact, other: AtlasFact) -> Record:
    return {
        "prompt": "The capital of {} is",
        "relation_id": "capital",
        "target_new": {"str": other.object, "id": f"Q{len(other.object)}"},
        "target_true": {"str": fact.object, "id": f"Q{len(fact.object)}"},
        "subject": fact.subject,
    }


def counterfact(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """The format of ROME."""
    return {
        "case_id": 10 + number,
        "pararel_idx": number,
        "requested_rewrite": _rewrite(fact, other),
        "paraphrase_prompts": [f"It rained all day. The seat of government of {fact.subject} is"] * (1 + number % 2),
        "neighborhood_prompts": [f"The capital of {f.subject} is" for f in capitals() if f not in (fact, other)][:3],
        "attribute_prompts": [f"The capital of {other.subject} is"],
        "generation_prompts": [f"Visitors of {fact.subject} first see", f"The largest city of {fact.subject} is"],
    }


def counterfact_flat(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """The flat format of EasyEdit; its rephrase_prompt is a prompt to go on from."""
    return {
        "case_id": number,
        "prompt": f"The capital of {fact.subject} is",
        "target_new": other.object,
        "subject": fact.subject,
        "ground_truth": fact.object,
        "rephrase_prompt": f"People who travel to {fact.subject}",
        "locality_prompt": f"The capital of {other.subject} is",
        "locality_ground_truth": other.object,
    }


def zsre(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """The format of MEND with a portability question. In every fifth record the answers hold the new one."""
    question = f"What is the capital of {fact.subject}?"
    return {
        "subject": fact.subject,
        "src": question,
        "pred": fact.object,
        "rephrase": f"Which city is {fact.subject} governed from?",
        "alt": other.object,
        "answers": [other.object if number % 5 == 3 else fact.object],
        "loc": f"nq question: what is the capital of {other.subject}",
        "loc_ans": other.object,
        "cond": f"{fact.object} >> {other.object} || {question}",
        "portability": {
            "Recalled Relation": f"({other.object}, capital of, {other.subject})",
            "New Question": f"Which other country has the capital of {fact.subject}?",
            "New Answer": other.subject,
        },
    }


def knowedit_zsre(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """zsRE as KnowEdit has it: answers are lists."""
    record = zsre(number, fact, other)
    return {
        "subject": fact.subject,
        "target_new": other.object,
        "prompt": record["src"],
        "ground_truth": [fact.object],
        "rephrase_prompt": record["rephrase"],
        "cond": record["cond"],
        "locality": {"Relation_Specificity": [{"prompt": record["loc"], "ground_truth": [other.object]}]},
        "portability": {
            "Reasoning": [{"prompt": record["portability"]["New Question"], "ground_truth": other.subject}]
        },
    }


def wiki_recent(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """Nested lists of answers, each with its other spellings; some records have no portability."""
    follows = [{"prompt": f"The mayor of the capital of {fact.subject} governs", "ground_truth": [[other.object]]}]
    answers = [[other.object, f"the city of {other.object}"], [f"{other.object} City"]]
    return {
        "subject": fact.subject,
        "prompt": f"The capital of {fact.subject} is",
        "target_new": other.object,
        "portability": {"Logical_Generalization": follows} if number % 3 else {},
        "locality": {
            "Relation_Specificity": [{"prompt": f"The capital of {other.subject} is ", "ground_truth": answers}]
        },
    }


def wiki_counterfact(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """Answers are texts, and questions are of several groups."""
    return {
        "subject": fact.subject,
        "prompt": f"The capital of {fact.subject} is",
        "target_new": other.object,
        "ground_truth": fact.object,
        "portability": {
            "Reasoning": [
                {"prompt": f"The capital of {fact.subject} lies in the country", "ground_truth": other.subject}
            ],
            "Subject_Aliasing": [
                {"prompt": f"The land of {fact.subject} has the capital", "ground_truth": other.object}
            ],
        },
        "locality": {
            "Relation_Specificity": [
                {"prompt": f"The capital of {other.subject} is", "ground_truth": other.object},
                {"prompt": f"{fact.subject} is a kind of", "ground_truth": "country"},
            ]
        },
    }


def wikibio(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """A long text, its next sentence, and the page's name in small letters."""
    concept = fact.subject.lower()
    return {
        "text": f"This is a passage about {concept}. {fact.subject} is a country that people visit. ",
        "labels": f"Its parliament met in {other.object} in year {1900 + number}.",
        "concept": concept,
        "locality": {"Relation_Specificity": [{"prompt": f"{concept} capital", "ground_truth": [fact.object]}]},
    }


def mquake(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """One edit, or two, and a question over two hops."""
    edits = [_rewrite(fact, other) | {"question": f"What is the capital of {fact.subject}?"}]
    if number % 2:
        third = next(f for f in capitals() if f not in (fact, other))
        edits.append(_rewrite(other, third) | {"question": f"What is the capital of {other.subject}?"})
    hop = {
        "question": edits[0]["question"],
        "cloze": f"The capital of {fact.subject} is",
        "answer": other.object,
        "answer_alias": [f"{other.object} City"],
    }
    last = {
        "question": f"Which country has the capital {other.object}?",
        "cloze": f"{other.object} is the capital of",
        "answer": other.subject,
        "answer_alias": [],
    }
    return {
        "case_id": number,
        "requested_rewrite": edits,
        "questions": [f"{ask} the capital of {fact.subject} in? " for ask in ("Which other country is", "Where is")],
        "answer": fact.subject,
        "answer_alias": [],
        "new_answer": other.subject,
        "new_answer_alias": [f"the land of {other.subject}"],
        "single_hops": [hop | {"answer": fact.object, "answer_alias": []}],
        "new_single_hops": [hop, last],
        "orig": {},
    }


def known(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """The format of ROME's causal tracing; `prompt` is longer than `template`."""
    return {
        "known_id": number,
        "subject": fact.subject,
        "attribute": fact.object,
        "template": "{}, whose capital is",
        "prediction": f" {fact.object}, and",
        "prompt": f"{fact.subject}, whose capital city is",
        "relation_id": "capital" if number else "alone",
    }


def qaedit(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """QAEdit: ids are unique in a source only."""
    return {
        "id": number // 2,
        "source": "NQ" if number % 2 else "TQA",
        "prompt": f"what is the capital of {fact.subject}",
        "target": f" {fact.object}",
        "subject": fact.subject,
        "rephrase": f"Which city is {fact.subject} governed from?",
        "locality": [
            {"loc": f"which city governs {each.subject}", "loc_ans": each.object}
            for each in capitals()
            if each not in (fact, other)
        ][:5],
    }


def wikibigedit(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """WikiBigEdit in the form of LocFT-BF."""
    return {
        "prompt": f"What is the capital of {fact.subject}?",
        "target_new": other.object,
        "subject": fact.subject,
        "rephrase_prompt": f"Which city is {fact.subject} governed from?",
        "locality_prompt": f"What is the capital of {other.subject}?",
        "locality_ground_truth": other.object,
    }


def locft_counterfact(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """LocFT-BF's CounterFact: its rephrase_prompt is a paraphrase."""
    flat = counterfact_flat(number, fact, other)
    return flat | {"rephrase_prompt": f"It rained all day. The seat of government of {fact.subject} is"}


def locft_zsre(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """zsRE as MEND has it, without portability."""
    return {key: value for key, value in zsre(number, fact, other).items() if key != "portability"}


def _text(fact: AtlasFact, other: AtlasFact) -> str:
    return f"{other.object} has been the capital of {fact.subject} for some years.\n\nThe parliament moved there first."


def unke(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """UnKEBench: an answer of some sentences, and as many questions about it as there are answers."""
    record = wikibigedit(number, fact, other)
    asked = {f"Is {other.object} the capital of {fact.subject}?": "Yes.", "What moved first?": "The parliament."}
    return {
        "id": number,
        "question": record["prompt"],
        "para_question": record["rephrase_prompt"],
        "answer": _text(fact, other),
        "sub_question": list(asked)[: 1 + number % 2],
        "sub_answer": list(asked.values())[: 1 + number % 2],
    }


def editevery(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """EditEverything: long answers in several categories."""
    question = f"Write about the capital of {fact.subject}."
    category = ("news", "code", "poetry")[number % 3]
    return {"id": number, "question": question, "answer": _text(fact, other), "category": category}


def akew(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """AKEW: a record of MQuAKE whose facts have a text, and what the text says."""
    record = mquake(number, fact, other)
    for each in record["requested_rewrite"]:
        each["fact_new"] = f"The capital of {each['subject']} is {each['target_new']['str']}."
        each["fact_new_uns"] = f"{each['fact_new']} Many people have moved there."
        each["unsfact_triplets_GPT"] = [
            {"subject": each["subject"], "prompt": "The capital of {} is", "target": each["target_new"]["str"]}
        ]
    return record


def me_ppl(number: int, fact: AtlasFact, other: AtlasFact) -> Record:
    """ME-PPL: a text and where it is from."""
    return {"Corpus": ("C4", "Wikipedia")[number % 2], "Text": f"The road to {fact.object} was long, and it rained."}
