"""Judges of free answers: over HTTP from a real server, a model in a folder, the exact rule, and a run without one."""

import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from editkit.config import prepare
from editkit.errors import ConfigError
from editkit.judges import VERSION, JudgeError, Question, Verdict, http, model, names, open_judge, register, unregister
from editkit.judges.http import KEY, HttpJudge, yes_or_no
from editkit.judges.model import ModelJudge
from editkit.judging import GIVE_UP, Judging
from editkit.models.load import BUNDLED
from editkit.report import write
from editkit.runs.collect import merge
from editkit.testing.tiny import tiny_lm
from tests.run_folders import FAST, copied, really_run, record_of

SHORT = (
    *FAST[1:],
    "method.steps=1",
    "task.measure.fluency=0",
    "task.measure.natural=6",
    "task.measure.distracted=false",
)
RIGHT, WRONG = Question("Big Ben is in", ("Rome",), "Rome, of course"), Question("Big Ben is in", ("Rome",), "London")


class Server:
    """An endpoint of chat completions that says yes where the reference is in the answer. `refusals`: what it does
    instead, first: a code, with headers, or "hang up"; `said`: what it answers in place of a verdict."""

    def __init__(self) -> None:
        self.refusals: list[tuple[int, dict[str, str]] | str] = []
        self.said: str | None = None
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.url = ""

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        body = json.loads(to.rfile.read(int(to.headers["Content-Length"])))
        self.requests.append((to.path, dict(to.headers), body))
        refusal = self.refusals.pop(0) if self.refusals else None
        if refusal == "hang up":
            to.close_connection = True
            return
        code, headers = refusal if isinstance(refusal, tuple) else (200, {})
        prompt = body["messages"][0]["content"]
        expected, answer = (prompt.split(f"{name}: ")[1].split("\n")[0] for name in ("Reference answer", "\nAnswer"))
        reply = {"role": "assistant", "content": "Yes." if expected in answer else "No."}
        text = json.dumps({"choices": [{"message": reply}], "usage": {"total_tokens": len(prompt.split())}})
        text = f"no: {to.headers.get('Authorization')}" if code != 200 else self.said or text
        to.send_response(code)
        for name, value in headers.items():
            to.send_header(name, value)
        to.send_header("Content-Length", str(len(text)))
        to.end_headers()
        to.wfile.write(text.encode())


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            server.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server.url = f"http://127.0.0.1:{listening.server_address[1]}/v1"
        yield server
        listening.shutdown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("EDITKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr(http, "WAITS", (0.01, 0.02, 0.03))
    with serving() as found:
        yield found


def http_judge(server: Server, name: str = "grader") -> HttpJudge:
    judge = open_judge(f"http:{server.url}" + (f"@{name}" if name else ""), "cpu")
    assert isinstance(judge, HttpJudge)
    return judge


def row(question: str, answer: str | None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "rewrite", "prompt": question, "target_true": "London", "target_new": "Rome"}
    found |= {"aliases": [], "group": "", "greedy_true_before": True}
    return found | {"answer_before": "London", "answer_after": answer} | more


# --- over HTTP ----------------------------------------------------------------------------------------------------


def test_a_server_that_fails_twice_and_then_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("editkit.judges.http.time.sleep", waited.append)
    server.refusals = [(503, {}), "hang up"]
    judge = http_judge(server)
    (found,) = judge.verdicts([RIGHT])
    assert isinstance(found, Verdict) and found.right and found.reply == "Yes." and waited == [0.01, 0.02]
    assert found.tokens == len(RIGHT.prompt.split()) and found.seconds > 0
    path, headers, body = server.requests[-1]
    assert path == "/v1/chat/completions" and "Authorization" not in headers and len(server.requests) == 3
    asked = [{"role": "user", "content": RIGHT.prompt}]
    assert body == {"model": "grader", "messages": asked, "temperature": 0}
    many = [replace(WRONG, question=f"{n}") for n in range(9)] + [RIGHT]
    assert [each.right for each in judge.verdicts(many) if isinstance(each, Verdict)] == [False] * 9 + [True]


def test_it_waits_as_long_as_the_server_asks(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("editkit.judges.http.time.sleep", waited.append)
    server.refusals = [(429, {"Retry-After": "7"}), (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), (429, {})]
    (found,) = http_judge(server).verdicts([WRONG])
    assert isinstance(found, Verdict) and found.right is False and waited == [7.0, 0.02, 0.03]


def test_the_key_is_in_the_header_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "s3cret")
    judge = http_judge(server)
    (found,) = judge.verdicts([RIGHT])
    assert server.requests[0][1]["Authorization"] == "Bearer s3cret" and isinstance(found, Verdict)
    server.said = json.dumps({"choices": [{"message": {"content": "Yes to s3cret"}}]})
    (echoed,) = judge.verdicts([RIGHT])
    assert isinstance(echoed, Verdict) and echoed.reply == "Yes to …"
    server.refusals = [(401, {})]
    (refused,) = judge.verdicts([RIGHT])
    assert isinstance(refused, JudgeError) and len(server.requests) == 3  # a refusal for good is not tried again
    assert "answered 401" in str(refused) and "no: Bearer …" in str(refused)
    assert "s3cret" not in f"{refused}{judge.identity}{server.requests[0][2]}"
    server.refusals = [(307, {"Location": "/elsewhere"}), (302, {"Location": "/elsewhere"})]
    list(judge.verdicts([RIGHT]))
    assert all("Authorization" not in headers for path, headers, _ in server.requests if path == "/elsewhere")


def test_what_is_no_verdict_is_kept_as_said(server: Server) -> None:
    judge = http_judge(server, "")
    server.said = json.dumps({"choices": [{"message": {"content": "yes and no"}}]})
    (found,) = judge.verdicts([RIGHT])
    assert isinstance(found, Verdict) and found.right is None and found.tokens is None and found.reply == "yes and no"
    assert "model" not in server.requests[0][2]
    server.said = "<html>"
    (odd,) = judge.verdicts([RIGHT])
    assert isinstance(odd, JudgeError) and "no chat completion: '<html>'" in str(odd)
    assert yes_or_no("<think>yes\nno</think>\n**No**, it") is False and yes_or_no("maybe") is None


@pytest.mark.parametrize("address", ["ftp://a/v1", "http://u:1@a/v1", "http://a/v1?key=1", "http://u:p@a/v1", "zz"])
def test_an_address_that_could_hold_a_secret_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="no user, password or query. A key goes into .EDITKIT_JUDGE_KEY") as refused:
        open_judge(f"http:{address}", "cpu")
    assert address not in str(refused.value)


def test_an_address_may_be_written_as_it_is() -> None:
    for named in (
        "http://a:8/v1@org/m-1.5",
        "http:http://a:8/v1/@org/m-1.5",
        "http://a:8/v1/chat/completions@org/m-1.5",
    ):
        assert open_judge(named, "cpu").identity == "http:http://a:8/v1/chat/completions@org/m-1.5"
    assert open_judge("http:https://a", "cpu").identity == "http:https://a/chat/completions"


# --- what is kept -------------------------------------------------------------------------------------------------


def test_a_verdict_is_asked_for_once(server: Server, tmp_path: Path) -> None:
    lines: list[str] = []
    judging = Judging(f"http:{server.url}@grader", "cpu", lines.append)
    rows = [row("Big Ben is in", "Rome"), row("Big Ben is in", "Rome"), row("It is in", ""), row("x", None)]
    rows += [row("Big Ben is in", "Rome", kind="neighborhood"), row("y", "Rome", kind="negation")]
    entries = judging.rows("0", rows)
    assert [(r.get("judged_before"), r.get("judged_after")) for r in rows] == [
        *[(False, True)] * 2,
        (False, False),  # nothing was said: nobody is asked
        (False, None),  # nothing was asked
        (True, False),  # the old answer must stay
        (None, None),  # no one text is right
    ]
    assert "judged_after" not in rows[-1] and len(server.requests) == 6
    assert [entry["kept"] for entry in entries] == [False, False, True, True, *[False] * 5]
    again = Judging(f"http:{server.url}@grader", "cpu", lines.append)
    kept = again.rows("0", [row("Big Ben is in", "Rome")])
    assert len(server.requests) == 6 and [entry["kept"] for entry in kept] == [True, True]
    assert [entry["right"] for entry in kept] == [False, True] and kept[0]["tokens"] == entries[0]["tokens"]
    for path in (tmp_path / "cache" / "judged").rglob("*.json"):
        path.write_text("{}")  # a file that cannot be read counts as missing
    again.rows("0", [row("Big Ben is in", "Rome")])
    Judging(f"http:{server.url}@other", "cpu", lines.append).rows("0", [row("Big Ben is in", "Rome")])
    assert len(server.requests) == 10 and not lines
    about = judging.record([*entries, *kept])
    assert about and about["tokens"] == sum(entry["tokens"] for entry in entries if not entry["kept"])
    assert (about["asked"], about["kept"], about["unclear"], about["unjudged"]) == (11, 4, 0, 0)
    assert about["version"] == VERSION and about["identity"].endswith("/v1/chat/completions@grader")


def test_what_follows_is_judged_where_the_old_answer_was_known() -> None:
    judging = Judging("exact", "cpu", print)
    rows = [row("x", "Rome", kind="alias", greedy_true_before=known) for known in (True, False, None)]
    assert len(judging.rows("0", rows)) == 4 and [r["judged_after"] for r in rows] == [True, None, True]


def test_a_judge_that_is_not_there_is_told_of_and_left_alone(server: Server) -> None:
    lines: list[str] = []
    judging = Judging(f"http:{server.url}@grader", "cpu", lines.append)
    server.refusals = [(500, {})] * 4
    rows = [row("a", "Rome", answer_before=None)]
    (entry,) = judging.rows("0", rows)
    assert rows[0]["judged_after"] is None and "answered 500" in entry["error"] and len(server.requests) == 4
    assert len(lines) == 1 and "The run goes on; 1 answers of this case are not judged." in " ".join(lines[0].split())
    assert judging.rows("1", [row("b", "Rome", answer_before=None)])[0]["right"]  # it is back
    server.refusals = [(500, {})] * 40
    for number in range(GIVE_UP + 1):
        judging.rows("2", [row(f"c{number}", "Rome", answer_before=None)])
    assert len(server.requests) == 4 + 1 + 4 + (GIVE_UP - 1)  # one attempt while it is away, then none
    assert len(lines) == 3 and "It is not asked any more." in " ".join(lines[-1].split())
    about = judging.record([entry])
    assert about and about["unjudged"] == 1 and "answered 500" in about["unavailable"]
    assert (about["tokens"], about["seconds"]) == (None, 0)


# --- a model ------------------------------------------------------------------------------------------------------


def probability(lm: Any, prompt: str, word: str) -> float:
    """P(" word" | prompt) in float64 from one plain pass."""
    ids, begin = lm.tokenizer(f"{prompt} {word}")["input_ids"], len(lm.tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        log_p = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return math.exp(sum(float(log_p[at - 1, ids[at]]) for at in range(begin, len(ids))))


def test_a_model_takes_the_likelier_word(tmp_path: Path) -> None:
    lm = tiny_lm("llama", seed=3)
    lm.model.config.max_position_embeddings = 512
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    judge = open_judge(f"model:{tmp_path}", "cpu")
    assert isinstance(judge, ModelJudge) and judge.lm.model is not lm.model and judge.identity.endswith(lm.digest)
    asked = [replace(WRONG, answer=answer) for answer in ("Rome", "Oslo", "Madrid", "the city", "17")]
    found = list(judge.verdicts([*asked, replace(WRONG, answer="and " * 600)]))
    for each, verdict in zip(asked, found[:-1], strict=True):
        yes, no = (probability(judge.lm, f"{each.prompt}\nVerdict:", word) for word in ("yes", "no"))
        assert verdict.right is (yes > no) and verdict.reply == f"P(yes) {yes:.3g}, P(no) {no:.3g}"
        assert verdict.tokens == len(lm.tokenizer(f"{each.prompt}\nVerdict:", add_special_tokens=False)["input_ids"])
    assert found[-1].right is None and "512 positions" in found[-1].reply
    tokenizer = judge.lm.tokenizer
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [assistant] "
    (chat,) = judge.verdicts([RIGHT])
    yes, no = (probability(judge.lm, f"[user] {RIGHT.prompt} [assistant] Verdict:", word) for word in ("yes", "no"))
    assert chat.reply == f"P(yes) {yes:.3g}, P(no) {no:.3g}"
    assert len(asked) <= model.BATCH


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    lines: list[str] = []
    judging = Judging(f"model:{tmp_path}", "cpu", lines.append)
    (entry,) = judging.rows("0", [row("a", "Rome", answer_before=None)])
    assert len(lines) == 1 and "The run goes on" in " ".join(lines[0].split()) and str(tmp_path) in entry["error"]
    about = judging.record([entry])
    assert about and entry["right"] is None and about["unavailable"] == entry["error"] != "" and about["identity"] == ""


# --- runs ---------------------------------------------------------------------------------------------------------


def test_a_run_with_a_judge_over_http(server: Server, tmp_path: Path) -> None:
    server.refusals = [(503, {}), (503, {})]
    named = f"task.judge=http:{server.url}@grader"
    folder = really_run(tmp_path / "run", "task=benchmark", "data.limit=1", named, *SHORT)
    rows, record = pandas.read_parquet(folder / "cases.parquet"), record_of(folder)
    lines = [json.loads(line) for line in (folder / "judged.jsonl").read_text().splitlines()]
    judged = rows[rows.judged_after.notna()]
    assert len(lines) == 2 * len(judged) == record["judge"]["asked"] > 10 and record["judge"]["unjudged"] == 0
    for line in lines:
        assert line["prompt"] == Question(line["question"], tuple(line["expected"]), line["answer"]).prompt
        assert line["right"] == any(text in line["answer"] for text in line["expected"])
        assert line["case"] == rows.case[0] and line["tokens"] >= 0 and line["seconds"] >= 0
    assert record["judge"]["tokens"] == sum(line["tokens"] for line in lines if not line["kept"]) > 0
    assert record["judge"]["name"] == named.split("=", 1)[1] and "{answer}" in record["judge"]["prompt"]
    scores = {(s["metric"], s["when"]): s["mean"] for s in record["scores"]}
    stays = [
        right for kind, right in zip(judged["kind"], judged["judged_after"], strict=True) if kind == "neighborhood"
    ]
    assert scores["judged.neighborhood", "after"] == pytest.approx(sum(stays) / len(stays)) and any(stays)
    assert "free answers were judged by http:" in (folder / "report.html").read_text(encoding="utf-8")
    copied(folder, tmp_path / "copy", lambda found: found["judge"].update(asked=None, unclear=3, name=7))
    assert "judged by 7" in write(tmp_path / "copy").read_text(encoding="utf-8")
    for shard in ("0/2", "1/2"):  # as if it were a half of the data
        change = partial(halved, shard=shard)
        copied(folder, tmp_path / "shards" / shard[0], change)
    (merged,) = merge(tmp_path / "shards")
    assert record_of(merged)["judge"]["asked"] == 2 * len(lines)
    assert len((merged / "judged.jsonl").read_text().splitlines()) == 2 * len(lines)


def halved(record: dict[str, Any], *, shard: str) -> None:
    """A change of a record: the run was of one shard."""
    record["config"]["data"]["shard"] = record["data"]["shard"] = shard


def test_a_run_whose_judge_is_the_folder_of_the_edited_model(tmp_path: Path) -> None:
    folder = really_run(tmp_path / "run", "edit=gpt2_fact", f"task.judge=model:{BUNDLED['atlas']}", *SHORT)
    found = record_of(folder)["judge"]
    assert found["asked"] > 10 and found["unclear"] == 0 and "atlas" in found["identity"]
    lines = [json.loads(line) for line in (folder / "judged.jsonl").read_text().splitlines()]
    assert len(lines) == found["asked"] and {line["case"] for line in lines} == {"0"}
    assert all(line["reply"].startswith("P(yes)") for line in lines if line["answer"])


# --- names --------------------------------------------------------------------------------------------------------


def test_another_package_adds_a_judge(tmp_path: Path) -> None:
    class Kind:
        identity, lasting = "kind", False

        def verdicts(self, asked: Any) -> Iterator[Verdict]:
            yield from (Verdict(True, "well done") for _ in asked)

    register("kind", lambda rest, device: Kind())
    try:
        assert "kind" in names() and prepare(["task=benchmark", "task.judge=kind:to-all"])
        assert Judging("kind:to-all", "cpu", print).rows("0", [row("a", "b")])[1]["right"]
    finally:
        unregister("kind")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["task.judge=exakt"], "No judge 'exakt': did you mean 'exact'?"),
        (["task.judge=exact", "task.measure.natural=0"], "task.judge must be null where .* 0; found exact"),
        (["task.judge=exact", "task.measure.generate=0"], "task.judge must be null where .* 0; found exact"),
    ],
)
@pytest.mark.parametrize("task", ["edit", "benchmark", "lifelong"])
def test_what_is_no_judge_is_one_clear_line(task: str, asked: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare([f"task={task}", *asked])


@pytest.mark.parametrize(("named", "message"), [("model", "model:NAME_OR_FOLDER"), ("exact:x", "takes nothing")])
def test_a_judge_says_what_it_needs(named: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_judge(named, "cpu")
    assert KEY not in os.environ
