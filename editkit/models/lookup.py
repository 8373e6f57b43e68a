"""The lookup token: the place in a row of tokens where a fact's key is read and its value is written."""

from editkit.errors import FactError
from editkit.models.tokens import Rows
from editkit.settings import LOOKUP_TOKENS, require_one_of


def lookup_position(rows: Rows, row: int, template: str, subject: str, token: str = "subject_last") -> int:
    """The position of the lookup token in row `row`, whose text begins with `template` filled with `subject`.

    `token`: subject_last (ROME's choice), subject_first, subject_first_after_last, or last. Counted on
    the characters of the filled template, so BOS tokens, space prefixes and contexts before it are right.
    Raises FactError when no token covers the subject, or there is none after it.
    """
    require_one_of(token, "token", LOOKUP_TOKENS)
    before, after = template.split("{}", 1)
    if token == "last":
        whole = len(before) + len(subject) + len(after)
        return rows.tokens_covering(row, 0, whole)[-1]
    span = rows.tokens_covering(row, len(before), len(before) + len(subject))
    if not span:
        raise FactError(f"No token covers the subject {subject!r} in {rows.texts[row]!r}.")
    if token == "subject_first":
        return span[0]
    if token == "subject_last":
        return span[-1]
    if span[-1] + 1 > rows.last(row):
        raise FactError(f"There is no token after the subject {subject!r} in {rows.texts[row]!r}.")
    return span[-1] + 1
