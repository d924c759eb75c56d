"""Judges behind an address: a server in a thread that answers, stumbles, babbles and sleeps."""

from __future__ import annotations

import json
import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import HTTPBasicAuthHandler

import pytest

from immunity.data.corpus import Example
from immunity.errors import DataError, ModelError, SettingsError
from immunity.measure.endpoint import Endpoint
from immunity.measure.harm import harmfulness
from immunity.measure.judges_chat import ChatJudge, RubricJudge
from immunity.measure.judges_replies import Rubric

PROMPTS = [Example(f"Which potion has the number {i}?", "") for i in range(4)]
ANSWERS = ["The red one.", "I cannot say.", "Blue {forbidden_prompt} {0}", ""]
RUBRIC = "#scores\n1.a no\n1.b 0\n2.a yes\n2.b 4\n3.a yes\n3.b 5"


class Server:
    """Counts what it is asked; ``plan`` says what to do with a request: a reply, or a call on the handler."""

    def __init__(self):
        self.asked, self.keys, self.at_once, self.most = [], [], 0, 0
        self.plan = lambda _question, _n: "safe"
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked.append((self.path, body))
                    outer.keys.append(self.headers.get(HTTPBasicAuthHandler.auth_header))
                    outer.at_once += 1
                    outer.most = max(outer.most, outer.at_once)
                    n = len(outer.asked)
                said = outer.plan(body["messages"][-1]["content"], n)
                with outer.lock:
                    outer.at_once -= 1  # before the answer is out, after which the next request may come
                with suppress(BrokenPipeError, ConnectionResetError):
                    if callable(said):
                        said(self)
                    else:
                        reply(self, 200, {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]})

            def do_GET(self):
                outer.asked.append((self.path, None))
                reply(self, 200, {})

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def stop(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def reply(handler, code, body, **headers):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(code)
    for name, value in {"Content-Length": str(len(raw)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(raw)


def fails(code, body=b"{}", **headers):
    return lambda handler: reply(handler, code, body, **headers)


@pytest.fixture
def server():
    running = Server()
    yield running
    running.stop()


@pytest.fixture
def endpoint(server, tmp_path):
    return Endpoint(
        url=server.url, model="m", timeout=5, tries=3, pause=0.01, longest=0.05, parallel=2, cache=tmp_path / "replies"
    )


def unsafe_red(question, _n):
    return "unsafe" if "The red one" in question else "Verdict: safe"


def test_a_chat_model_judges_and_a_second_run_asks_nothing(server, endpoint):
    server.plan = unsafe_red
    judge = ChatJudge(endpoint=endpoint)
    assert judge.scores(PROMPTS, ANSWERS) == [1, 0, 0, 0]
    assert {path for path, _ in server.asked} == {"/v1/chat/completions"}
    assert len(server.asked) == 4
    server.plan = lambda _question, _n: fails(401)
    assert ChatJudge(endpoint=replace(endpoint, tries=1)).scores(PROMPTS, ANSWERS) == [1, 0, 0, 0]
    assert len(server.asked) == 4


def test_another_model_question_or_setting_is_asked_anew(server, endpoint):
    ChatJudge(endpoint=endpoint).scores(PROMPTS[:1], ANSWERS[:1])
    for other in (
        replace(endpoint, model="other"),
        replace(endpoint, temperature=None),
        replace(endpoint, max_tokens=9),
    ):
        ChatJudge(endpoint=other).scores(PROMPTS[:1], ANSWERS[:1])
    RubricJudge(endpoint=endpoint).scores(PROMPTS[:1], ANSWERS[:1])
    assert len(server.asked) == 5
    bodies = [body for _, body in server.asked]
    assert "temperature" not in bodies[2]
    assert bodies[3]["max_tokens"] == 9
    assert bodies[0]["temperature"] == 0


def test_equal_questions_are_asked_once(server, endpoint):
    assert ChatJudge(endpoint=replace(endpoint, cache=None)).scores(PROMPTS[:1] * 6, ANSWERS[:1] * 6) == [0] * 6
    assert len(server.asked) == 1
    ChatJudge(endpoint=replace(endpoint, cache=None)).scores(PROMPTS[:1], ANSWERS[:1])
    assert len(server.asked) == 2, "without a folder nothing is kept"


def test_the_cache_holds_replies_and_no_questions(server, endpoint):
    ChatJudge(endpoint=endpoint).scores(PROMPTS, ANSWERS)
    files = [path for path in endpoint.cache.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert not any("potion" in path.read_text() for path in files)
    files[0].write_text("{damaged")
    ChatJudge(endpoint=endpoint).scores(PROMPTS, ANSWERS)
    assert len(server.asked) == 5, "a damaged file is asked again"


@pytest.mark.parametrize("stumble", [fails(429), fails(500), fails(503, b"<html>"), fails(200, b"<html>"), fails(200)])
def test_errors_that_pass_are_tried_again(server, endpoint, stumble):
    server.plan = lambda _question, n: stumble if n < 3 else "unsafe"
    assert ChatJudge(endpoint=endpoint).scores(PROMPTS[:1], ANSWERS[:1]) == [1]
    assert len(server.asked) == 3


def test_a_sleeping_server_is_not_waited_for(server, endpoint):
    def sleep(handler):
        time.sleep(0.4)
        reply(handler, 200, {})

    server.plan = lambda _question, n: sleep if n == 1 else "unsafe"
    start = time.monotonic()
    assert ChatJudge(endpoint=replace(endpoint, timeout=0.1)).scores(PROMPTS[:1], ANSWERS[:1]) == [1]
    assert time.monotonic() - start < 0.4


def test_drips_and_half_replies_are_given_up(server, endpoint):
    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.03)

    def half(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')

    server.plan = lambda _question, n: (drip, half)[n - 1] if n < 3 else "unsafe"
    assert ChatJudge(endpoint=replace(endpoint, timeout=0.1)).scores(PROMPTS[:1], ANSWERS[:1]) == [1]
    assert len(server.asked) == 3


def test_retry_after_is_heeded_up_to_a_limit(server, endpoint):
    def plan(_question, n):
        return fails(429, Retry_After="0.2") if n == 1 else "safe"

    for longest, least, most in ((1.0, 0.2, 1.0), (0.05, 0.05, 0.2)):
        server.asked.clear()
        server.plan, start = plan, time.monotonic()
        ChatJudge(endpoint=replace(endpoint, longest=longest, cache=None)).scores(PROMPTS[:1], ANSWERS[:1])
        assert least <= time.monotonic() - start < most


def test_what_stays_unanswered_is_no_score_and_is_said(server, endpoint, caplog):
    def plan(question, _n):
        return {"The red": fails(400, b"quoting The red one"), "I cannot": fails(500)}.get(
            next((word for word in ("The red", "I cannot") if word in question), ""), "unsafe"
        )

    server.plan = plan
    with caplog.at_level(logging.WARNING):
        found = ChatJudge(endpoint=endpoint).scores(PROMPTS, ANSWERS)
    assert found == [None, None, 1, 1]
    assert len(server.asked) == 1 + 3 + 2, "what the server declines is not tried again"
    assert "no reply to 2 of 4" in caplog.text
    assert "The red" not in caplog.text, "an error may quote the question"
    harm = harmfulness(ChatJudge(endpoint=endpoint), PROMPTS, ANSWERS).harm
    assert (harm.unscored, harm.mean, harm.bounds) == (2, 1, (0.5, 1.0))


@pytest.mark.parametrize("said", ["Hm.", "safe unsafe", "not safe", None, ""])
def test_a_reply_that_says_nothing_is_no_score(server, endpoint, said):
    server.plan = lambda question, _n: said if "red" in question else "unsafe"
    assert ChatJudge(endpoint=endpoint).scores(PROMPTS, ANSWERS) == [None, 1, 1, 1]
    assert len(server.asked) == 4, "it was a reply, and asking again would be choosing"


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_refused_user_is_told_at_once_and_nothing_more_is_sent(server, endpoint, code, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sesame")
    server.plan = lambda _question, _n: fails(code, b'{"error": "the key sesame is wrong"}')
    with pytest.raises(ModelError, match=f"HTTP {code}.*TEST_KEY") as caught:
        ChatJudge(endpoint=replace(endpoint, key="TEST_KEY", parallel=1)).scores(PROMPTS, ANSWERS)
    assert "sesame" not in str(caught.value)
    assert len(server.asked) == 1


def test_a_server_that_answers_nothing_is_an_error_not_a_column_of_blanks(server, endpoint):
    server.plan = lambda _question, _n: fails(400, b"max_tokens is not supported")
    with pytest.raises(ModelError, match=r"none of 4 questions.*max_tokens is not supported"):
        ChatJudge(endpoint=endpoint).scores(PROMPTS, ANSWERS)
    with pytest.raises(ModelError, match="none of 4"):
        ChatJudge(endpoint=replace(endpoint, url="http://127.0.0.1:9/v1", tries=1)).scores(PROMPTS, ANSWERS)


def test_a_redirection_is_not_followed(server, endpoint, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sesame")
    server.plan = lambda _question, _n: fails(302, Location=f"{server.url}/elsewhere")
    with pytest.raises(ModelError, match="redirection"):
        ChatJudge(endpoint=replace(endpoint, key="TEST_KEY")).scores(PROMPTS[:1], ANSWERS[:1])
    assert len(server.asked) == 1


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(server, endpoint, monkeypatch, tmp_path):
    keyed = replace(endpoint, key="TEST_KEY")
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(SettingsError, match="TEST_KEY"):
        ChatJudge(endpoint=keyed).scores(PROMPTS[:1], ANSWERS[:1])
    assert not server.asked
    monkeypatch.setenv("TEST_KEY", " sesame\n")
    ChatJudge(endpoint=keyed).scores(PROMPTS[:1], ANSWERS[:1])
    ChatJudge(endpoint=replace(endpoint, model="n")).scores(PROMPTS[:1], ANSWERS[:1])
    assert server.keys == ["Bearer sesame", None]
    assert not any("sesame" in path.read_text() for path in tmp_path.rglob("*.json"))
    assert "sesame" not in repr(ChatJudge(endpoint=keyed))


def test_requests_at_once_are_bounded(server, endpoint):
    def plan(_question, _n):
        time.sleep(0.03)
        return "safe"

    server.plan = plan
    ChatJudge(endpoint=endpoint).scores([Example(str(i), "") for i in range(8)], ["a"] * 8)
    assert server.most == 2


def test_the_rubric_is_asked_in_its_own_words_and_read(server, endpoint):
    server.plan = lambda question, _n: RUBRIC if "red" in question else "no idea"
    judge = RubricJudge(endpoint=endpoint)
    assert judge.scores(PROMPTS, ANSWERS) == [7 / 8, None, None, None]
    assert judge.grades(PROMPTS, ANSWERS)[0] == Rubric(0, 4, 5)
    asked = next(body["messages"] for _, body in server.asked if "Blue" in body["messages"][1]["content"])
    assert asked[0]["content"].startswith("You are a helpful red teaming assistant.")
    assert "AI model response: Blue {forbidden_prompt} {0}\n\nEvaluate" in asked[1]["content"]
    assert "User instruction: Which potion has the number 2?\n" in asked[1]["content"]
    published = RubricJudge(endpoint=endpoint, parser="published")
    assert published.scores(PROMPTS[:1], ANSWERS[:1]) == [7 / 8]


def test_long_answers_are_cut_and_inputs_are_sent(server, endpoint):
    ChatJudge(endpoint=endpoint, most=3).scores([Example("Ask.", "", "Of what.")], ["abcdef"])
    asked = server.asked[0][1]["messages"][1]["content"]
    assert "Ask.\n\nOf what." in asked
    assert "=====\nabc\n=====" in asked


def test_what_is_recorded_does_not_depend_on_costs(endpoint):
    costs = replace(endpoint, timeout=1, tries=1, pause=9, longest=9, parallel=1, cache=None, key="K")
    assert repr(ChatJudge(endpoint=endpoint)) == repr(ChatJudge(endpoint=costs))
    assert repr(replace(endpoint, model="other")) != repr(endpoint)


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "ftp://host/v1"},
        {"url": "host/v1"},
        {"url": "https://"},
        {"url": "https://user:word@host/v1"},
        {"url": "https://host/v1?key=word"},
        {"url": "https://[host/v1"},
        {"model": ""},
        {"tries": 0},
        {"timeout": 0},
        {"parallel": 0},
        {"max_tokens": 0},
        {"pause": -1},
    ],
)
def test_unusable_settings_are_refused(endpoint, wrong):
    with pytest.raises(SettingsError) as caught:
        replace(endpoint, **wrong)
    assert "word" not in str(caught.value).replace("password", "")


def test_unusable_judges_are_refused(endpoint):
    for make in (ChatJudge, RubricJudge):
        with pytest.raises(SettingsError, match="most"):
            make(endpoint=endpoint, most=0)
        with pytest.raises(DataError, match="0 answers to 1"):
            make(endpoint=endpoint).scores(PROMPTS[:1], [])
    with pytest.raises(SettingsError, match="parser"):
        RubricJudge(endpoint=endpoint, parser="loose")


def test_an_address_may_name_the_whole_path(server, endpoint):
    ChatJudge(endpoint=replace(endpoint, url=f"{server.url}/chat/completions")).scores(PROMPTS[:1], ANSWERS[:1])
    ChatJudge(endpoint=replace(endpoint, url=f"{server.url}/", cache=None)).scores(PROMPTS[:1], ANSWERS[:1])
    assert [path for path, _ in server.asked] == ["/v1/chat/completions"] * 2
