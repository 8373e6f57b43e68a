"""An endpoint in the form of OpenAI's chat completions as the judge, as most servers of models offer it.

    POST URL/chat/completions   {"model": MODEL, "messages": [{"role": "user", "content": …}], "temperature": 0}

Tried again after 1, 2 and 4 seconds (longer where the answer says Retry-After) when the endpoint cannot be reached, is
too busy (429) or fails (5xx); any other refusal is final. The key in $EDITKIT_JUDGE_KEY goes into the header alone: it
is in no record and no message, and does not follow a redirection.
"""

import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any
from urllib.parse import urlsplit

from editkit.errors import ConfigError
from editkit.judges import JudgeError, Question, Verdict, register, required

KEY = "EDITKIT_JUDGE_KEY"
WAITS = (1.0, 2.0, 4.0)  # seconds before the second attempt and the later ones
LONGEST_WAIT = 60.0  # that a Retry-After is followed for
TIMEOUT = 120.0  # seconds for one answer
WORKERS = 4  # questions under way at a time
AGAIN = (408, 425, 429)  # refusals that pass, beside all from 500 on
SHOWN = 200  # characters of an endpoint's message
# Host, path and model. A user, a password and a query are refused: they are places of secrets, and records hold this.
_ADDRESS = re.compile(r"(https?://[^/@\s?#]+)(?:(/[^@\s?#]*)(?:@(\S+))?)?")


class HttpJudge:
    """One endpoint and one of its models ("" where it has one)."""

    lasting = True

    def __init__(self, url: str, model: str) -> None:
        self.url = url if url.endswith("/chat/completions") else f"{url.rstrip('/')}/chat/completions"
        self.model = model
        self.identity = f"http:{self.url}" + (f"@{model}" if model else "")
        self._down = False  # it was not there when it was asked last

    def verdicts(self, asked: Sequence[Question]) -> Iterator[Verdict | JudgeError]:
        gone = threading.Event()  # then the others of these questions are not waited for
        pool = ThreadPoolExecutor(WORKERS)
        try:
            yield from pool.map(lambda each: self._asked(each, gone), asked)
        finally:  # an interrupt waits for no answer
            pool.shutdown(wait=False, cancel_futures=True)

    def _asked(self, asked: Question, gone: threading.Event) -> Verdict | JudgeError:
        if gone.is_set():
            return JudgeError(f"'{self.url}' could not be asked, as for the answer before.")
        waits = [] if self._down else list(WAITS)
        while True:
            try:
                found = self._once(asked)
            except _Refused as refused:
                if not (refused.passes and waits):
                    gone.set()
                    self._down = True
                    return JudgeError(f"'{self.url}' {str(refused).rstrip('.')}.")
                time.sleep(max(waits.pop(0), refused.wait))
            else:
                self._down = False
                return found

    def _once(self, asked: Question) -> Verdict:
        """One attempt. Raises _Refused."""
        body: dict[str, Any] = {"messages": [{"role": "user", "content": asked.prompt}], "temperature": 0}
        if self.model:
            body["model"] = self.model
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if key := os.environ.get(KEY):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        began = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                text = _text(answer)
        except urllib.error.HTTPError as error:
            said = _message(error)
            why = f"answered {error.code} {error.reason}" + (f": {said}" if said else "")
            passes = error.code in AGAIN or error.code >= 500
            raise _Refused(why, passes=passes, wait=_seconds(error.headers.get("Retry-After"))) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise _Refused(f"cannot be reached: {getattr(error, 'reason', error)}", passes=True) from None
        return _verdict(text, round(time.perf_counter() - began, 4))


class _Refused(Exception):
    """An attempt without an answer. `passes`: it may be different soon; `wait`: the endpoint's own wish, seconds."""

    def __init__(self, why: str, *, passes: bool = False, wait: float = 0.0) -> None:
        super().__init__(why)
        self.passes, self.wait = passes, wait


def _text(answer: IO[bytes]) -> str:
    """What an endpoint says, without the key where it repeats that."""
    text, key = answer.read().decode("utf-8", errors="replace"), os.environ.get(KEY)
    return text.replace(key, "…") if key else text


def _message(error: urllib.error.HTTPError) -> str:
    """The beginning of what an endpoint says about a refusal, in one line."""
    try:
        return " ".join(_text(error)[:SHOWN].split())
    except (OSError, http.client.HTTPException):
        return ""


def _seconds(retry_after: str | None) -> float:
    """A Retry-After in seconds; 0 for none, and for a date."""
    return min(float(retry_after), LONGEST_WAIT) if retry_after and retry_after.isdecimal() else 0.0


def _verdict(text: str, seconds: float) -> Verdict:
    """The verdict of an endpoint's answer. Raises _Refused where that is of another form."""
    try:
        answer = json.loads(text)
        reply = answer["choices"][0]["message"]["content"] or ""
        used = answer.get("usage") or {}
        tokens = used.get("total_tokens")
        return Verdict(yes_or_no(reply), reply, tokens if isinstance(tokens, int) else None, seconds)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _Refused(f"gave no chat completion: {text[:SHOWN]!r}") from None


def yes_or_no(reply: str) -> bool | None:
    """The one of both words that a reply says; None where it says both or neither. What a model thinks is left out.

    >>> yes_or_no("Yes."), yes_or_no("<think>no?</think> yes"), yes_or_no("No, not now"), yes_or_no("yes and no")
    (True, True, False, None)
    """
    said = re.sub(r"<think>.*?</think>", "", reply, flags=re.DOTALL).lower()
    words = {word for word in re.findall(r"\w+", said) if word in ("yes", "no")}
    return "yes" in words if len(words) == 1 else None


def open_http(rest: str, device: str) -> HttpJudge:
    """`rest`: URL or URL@MODEL; "//HOST…" of task.judge=http://HOST… is the address itself. Raises ConfigError."""
    address = required(rest, "http:URL@MODEL")
    found = _ADDRESS.fullmatch(f"http:{address}" if address.startswith("//") else address)
    if found is None or not _has_a_port(found[1]):
        raise ConfigError(
            "task.judge=http:… names no address that can be used. Write the address, and the model behind its path, as "
            f"in task.judge=http:http://localhost:8000/v1@MODEL: no user, password or query. A key goes into ${KEY}."
        )
    host, path, model = found.groups(default="")
    return HttpJudge(host + path, model)


def _has_a_port(host: str) -> bool:
    """Whether the port is a number, or left out."""
    try:
        return urlsplit(host).port != 0
    except ValueError:
        return False


register("http", open_http)
