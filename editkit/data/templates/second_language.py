"""Second language: the statement in German and in French, for relations whose objects have one name in all languages.

The atlas has no second language: its texts and its model are English, so its relations have no such words. A relation
gets them with an entry `translated` in `data/wording.json`.
"""

from collections.abc import Iterator

from editkit.data.cases import Case, Probe
from editkit.data.kinds import SECOND_LANGUAGE
from editkit.data.templates import register
from editkit.data.wording import told


def second_language(case: Case) -> Iterator[Probe]:
    for each in told(case):
        for language, words in each.wording.translated.items():
            prompt = each.fact.filled(words)
            yield Probe(SECOND_LANGUAGE, prompt, each.fact.target_true, each.fact.target_new, group=language)


register(SECOND_LANGUAGE, second_language)
