"""core/endpoint.py and core/server.py against a real local HTTP server: what is asked again, what
ends a stage, what a model refuses, where a request goes, what is tried before a run."""
import contextlib
import functools
import gzip
import json
import re
import signal
import socket
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from email.message import Message

import judge_server
import pytest
from judge_server import Server, chat, endpoint
from kill_test import call, environment
from test_stages import house_in

import compare
import core.endpoint
import core.server
import core.verdict
import evaluate
from core.records import InputError

server = judge_server.server        # the fixture


# ---------------------------------------------------------------- the endpoint
def test_both_orders_are_asked_once_and_kept(server, tmp_path):
    questions = [("q", "short", "a longer one"), ("q", "a longer one", "short"),
                 ("r", "same", "size"), ("q", "short", "a longer one")]
    assert endpoint(server).preferences(questions) == [(1, 0), (0, 1), (0, 0), (1, 0)]
    assert len(server.requests) == 4
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    sent = {(b["model"], b["temperature"], b["seed"], h["Authorization"])
            for _, b, h in server.requests}
    assert sent == {("m", 0, 0, "Bearer sk-secret")}
    assert endpoint(server).preferences(questions[::-1]) == [(1, 0), (0, 0), (0, 1), (1, 0)]
    assert len(server.requests) == 4
    kept = list((tmp_path / "cache").rglob("*.json"))
    assert len(kept) == 4 and not any("sk-secret" in p.read_text() for p in kept)
    kept[0].write_text("{")                 # broken: asked again
    endpoint(server).preferences(questions)
    assert len(server.requests) == 5
    core.endpoint.Endpoint(server.url, "other", "ILR_JUDGE").preferences(questions)
    assert len(server.requests) == 9        # another model: other content


OTHER_LETTER = {"content": [{"token": "A", "top_logprobs": [{"token": "A", "logprob": 0}]}]}


@pytest.mark.parametrize("reply, p", [
    (chat("A"), 0), (chat("Well.\n\nB\n"), 1), (chat("It is: **B**."), 1), (chat("Sure. `A`"), 0),
    (chat("x\nB", {"B": -0.1, "A": -2.3, "C": -1}), 1 / (1 + 2.718281828459045 ** -2.2)),
    (chat("x\nB", {"B": -0.1}), 1), (chat("x\nA", {"A": -1, " A": -1, "B": -1}), 1 / 3),
    (chat("x\nB", {"C": -1}), 1), (chat("x\nB", {"B": "?"}), 1),
    ({"choices": [{**chat("x\nB")["choices"][0], "logprobs": OTHER_LETTER}]}, 1),
    *[(r, None) for r in (
        chat("both A and B"), chat("the better one is A"), chat(""), chat("C"), chat("A or B?"),
        chat("AB"), chat("BANANA"), chat("A\nis what I say"), {}, {"choices": []},
        {"choices": [{"message": {"content": None}}]}, {"choices": 3})]])
def test_reading_a_verdict(reply, p):
    if p is None:
        with pytest.raises(core.endpoint.Unreadable):
            core.endpoint.probability_of_b(reply)
    else:
        # float64 arithmetic
        assert core.endpoint.probability_of_b(reply) == pytest.approx(p, abs=1e-12)


def test_a_long_reply_is_read_in_no_time():
    start = time.monotonic()
    with pytest.raises(core.endpoint.Unreadable):
        core.endpoint.probability_of_b(chat("\n" * 10**6 + "`" * 10**6 + "x"))
    assert time.monotonic() - start < 5     # a pattern that tries every line break takes hours


def test_failing_servers_are_asked_again(server):
    failures = [(500, "oops", {}), (429, "busy", {"Retry-After": "0"}), (503, "", {}),
                (200, "<html>", {}), (200, "[1]", {})]
    left = {}

    def says(handler, route, body):
        todo = left.setdefault(body["messages"][0]["content"], list(failures))
        return todo.pop() if todo else Server.good(handler, route, body)
    server.says = says
    assert endpoint(server).preferences([("q", "short", "a longer one")]) == [(1, 0)]
    assert len(server.requests) == 12


def test_a_reply_without_a_verdict_is_asked_for_with_another_seed(server):
    def says(handler, route, body):
        return Server.good(handler, route, body) if body["seed"] == 2 else chat("I cannot say.")
    server.says = says
    assert endpoint(server).preferences([("q", "short", "a longer one")]) == [(1, 0)]
    assert len(server.requests) == 6


@pytest.mark.parametrize("says, message, most", [
    ((401, '{"error": "wrong key sk-secret \x1b[2J"}', {}),
     r"after 1 of 3 tries: ILR_JUDGE_KEY is refused: HTTP 401: .*wrong key \[key\]", 1),
    ((400, "x" * 65530 + "sk-secret" * 100, {}), "after 1 of 3 tries: HTTP 400: xxx", 1),
    ((200, "you sent Bearer sk-secret", {}), r"you sent Bearer \[key\]", 3),
    (chat("you sent Bearer sk-secret"), r"you sent Bearer \[key\]", 3),
    ((503, "busy", {"Retry-After": "\u00b2"}), "HTTP 503: busy", 3),
    ((307, "", {"Location": "http://127.0.0.1:1/"}), "after 1 of 3 tries: HTTP 307", 1),
    ((500, "down", {}), "after 3 of 3 tries: HTTP 500: down", 3),
    ((200, "nonsense", {}), "3 tries: the reply is not JSON: nonsense", 3),
    ((200, "[" * 10**6, {}), "3 tries: the reply is not JSON", 3),
    (chat("Neither \x1b[2J"), "does not end in A or B alone: Neither", 3), (None, "3 tries: ", 3)])
def test_a_server_that_never_answers_well_ends_the_stage(server, monkeypatch, says, message, most):
    monkeypatch.setattr(core.endpoint, "ATTEMPTS", 3)
    monkeypatch.setenv("ILR_JUDGE_CONCURRENCY", "1")
    server.says = lambda *_: says
    with pytest.raises(OSError, match=message) as e:
        endpoint(server).preferences([("q", "short", f"a longer one {i}") for i in range(30)])
    assert len(server.requests) == most and "sk-secret" not in str(e.value)
    assert "\x1b" not in str(e.value)


@pytest.mark.parametrize("how", ["hangs", "drips", "is not there"])
def test_a_server_that_hangs(server, monkeypatch, how):
    released = threading.Event()

    def says(handler, route, body):
        if how == "hangs":
            released.wait(20)
            return None
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not released.wait(0.05):
                handler.wfile.write(b" ")
                handler.wfile.flush()
    server.says = says
    monkeypatch.setattr(core.endpoint, "ATTEMPTS", 2)
    monkeypatch.setattr(core.endpoint, "TIMEOUT", 0.3)
    if how == "is not there":
        server.url = "http://127.0.0.1:1/v1"
    start = time.monotonic()
    with pytest.raises(OSError, match="after 2 of 2 tries"):
        endpoint(server).preferences([("q", "short", "a longer one")])
    assert time.monotonic() - start < 15        # 2 tries of 0.3 s, on a busy machine
    released.set()


def test_requests_are_side_by_side_but_bounded(server, monkeypatch):
    def slow(*request):
        time.sleep(0.1)
        return Server.good(*request)
    server.says = slow
    monkeypatch.setenv("ILR_JUDGE_CONCURRENCY", "4")
    endpoint(server).preferences([(str(i), "short", "a longer one") for i in range(12)])
    assert len(server.requests) == 24 and 2 <= server.most <= 4


@pytest.mark.parametrize("url, model, names, message", [
    ("ftp://x", "m", {}, "expected http"),
    ("http://h/v1/chat/completions", "m", {}, "ends before /chat"),
    ("http://h/v1?api_key=secret", "m", {}, "without a user, a key or a query"),
    ("http://[::1/v1", "m", {}, "expected http"), ("http://h:abc/v1", "m", {}, "expected http"),
    ("http://a..b/v1", "m", {}, "expected http"), ("http://h/\u00fc", "m", {}, "expected http"),
    ("http://h", "m", {"ILR_JUDGE_MAX_TOKENS": "-1"}, "MAX_TOKENS must be a number"),
    ("https://key@host/v1", "m", {}, "without a user, a key or a query"),
    ("http://", "m", {}, "expected http"), ("http://h/v1", "", {}, "set ILR_JUDGE_MODEL"),
    ("http://h", "m", {"ILR_JUDGE_CONCURRENCY": "0"}, "from 1 to 1000"),
    ("http://h", "m", {"ILR_JUDGE_CONCURRENCY": "x"}, "from 1 to 1000"),
    ("http://h", "m", {"ILR_JUDGE_KEY": "a\nb"}, "word of ASCII"),
    ("http://h", "m", {"ILR_JUDGE_KEY": "\u00e9"}, "word of ASCII")])
def test_bad_settings(monkeypatch, url, model, names, message):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as e:
        core.endpoint.Endpoint(url, model, "ILR_JUDGE")
    assert "a\nb" not in str(e.value)




# ---------------------------------------------------------------- errors in a reply
ANSWER = chat("Both are fair.\nA")
BUSY = [        # what a server says, most of it with status 200, and words of it
    ({"error": {"message": "Provider returned error", "code": 502,        # OpenRouter
                "metadata": {"raw": "upstream is out of capacity"}}}, "out of capacity"),
    ({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, "slow down"),
    ({"error": {"message": "The engine is overloaded", "type": "overloaded_error"}}, "overloaded"),
    ({**ANSWER, "error": {"message": "the stream broke"}}, "the stream broke"),
    ({"error": "The model has crashed"}, "The model has crashed"),        # LM Studio, Ollama
    ([{"error": {"code": 503, "message": "The model is overloaded", "status": "UNAVAILABLE"}}],
     "The model is overloaded"),                                          # Gemini
    ({"object": "error", "message": "NETWORK ERROR", "code": 50001}, "NETWORK ERROR"),  # FastChat
    ({"choices": [{"error": {"code": 502, "message": "worker died"}, "finish_reason": "error",
                   "message": {"content": ""}}]}, "worker died"),
    ({"choices": [{"finish_reason": "error", "message": {"content": "A"}}]}, "finish_reason"),
    ({"choices": [{"finish_reason": "abort", "message": {"content": "A"}}]}, "abort"),
    ({"choices": None, "base_resp": {"status_msg": "rate limit"}}, "rate limit"),       # MiniMax
    ((429, {"error": {"message": "content filter overloaded"}}, {}), "content filter overloaded"),
    ({"choices": []}, "without an answer"), ({}, "without an answer"),
    ({"choices": [None]}, "without an answer"),
    ({"choices": [{"message": None}]}, "without an answer"),
    ({"choices": [{"message": {"content": None}}]}, "without an answer"),
    ({"choices": [{"message": {"content": " \n"}}]}, "without an answer"),
    ({"choices": [{"message": {"content": None, "reasoning_content": "I think\nA"}}]},
     "but reasoning"),
    (chat("<think>It is\nA"), "but reasoning"),
    ({"detail": "warming up"}, "warming up"), ([1], "not a JSON object"),
    ((200, "<html><style>p{}</style><body>Bad <b>gateway</b>\nA</body></html>", {}),
     "not JSON: Bad gateway A"),
    ((200, "", {}), "not JSON"), ((200, "null", {}), "not JSON"), ((200, '"A"', {}), "not a JSON")]


@pytest.mark.parametrize("says, words", BUSY)
def test_an_error_in_a_reply_is_a_failing_server_and_no_verdict(server, monkeypatch, says, words):
    """It is waited for as after a 503; ILR_JUDGE_UNDECIDED=1 makes no 0.5 of an outage."""
    monkeypatch.setenv("ILR_JUDGE_UNDECIDED", "1")
    monkeypatch.setattr(core.endpoint, "LONGEST_WAIT", 60)
    left = [2]

    def recovers(handler, route, body):
        left[0] -= 1
        return says if left[0] >= 0 else ANSWER
    server.says = recovers
    one = endpoint(server)
    waits = no_waiting(one)
    assert one.prefers_b(("q", "a", "b")) == 0 and len(server.requests) == 3
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2
    server.says = lambda *_: says
    one = endpoint(server)
    waits = no_waiting(one)
    with pytest.raises(OSError, match="after 6 of 6 tries: ") as e:
        one.prefers_b(("r", "a", "b"))
    assert words in str(e.value) and "\n" not in str(e.value)
    assert len(server.requests) == 9 and len(waits) == 5 and waits[-1] >= 8
    assert one.undecided == 0


def no_waiting(one):
    """The waits of an endpoint from now on: seconds, none of which is waited."""
    waits = []
    one.stop.wait = waits.append
    return waits


@pytest.mark.parametrize("error, words", [
    ({"message": "No auth credentials found", "code": 401}, "ILR_JUDGE_KEY is refused: .*No auth"),
    ({"message": "Incorrect API key", "code": "invalid_api_key"}, "ILR_JUDGE_KEY is refused"),
    ({"message": "This request requires more credits, or fewer max_tokens.", "code": 402},
     "more credits"),
    ({"message": "bad messages", "type": "invalid_request_error", "code": None}, "bad messages"),
    ({"message": "nope is not a valid model ID", "code": 400}, "nope is not a valid model ID"),
    ({"message": "no such model", "code": "model_not_found"}, "no such model"),
    ({"message": "bad", "code": "400", "type": "None", "param": "None"}, "bad")])
def test_an_error_in_a_reply_ends_the_stage_at_once_if_its_code_says_so(server, error, words):
    for says in ({"error": error}, [{"error": error}]):
        server.says, server.requests = lambda *_, says=says: says, []
        with pytest.raises(OSError, match=f"after 1 of 6 tries: .*{words}"):
            endpoint(server).prefers_b(("q", "a", "b"))
        assert len(server.requests) == 1


# ---------------------------------------------------------------- parameters that are refused
def forbidden(name):
    return {"type": "extra_forbidden", "loc": ["body", name],
            "msg": "Extra inputs are not permitted", "input": 0}


def openai(message, param=None, code="unsupported_parameter"):
    return {"error": {"message": message, "type": "invalid_request_error", "param": param,
                      "code": code}}


NEWER = "max_completion_tokens"
REFUSALS = [    # status, what is refused, the server's words
    (400, ["max_tokens"], openai("Unsupported parameter: 'max_tokens' is not supported with this "
                                 f"model. Use '{NEWER}' instead.", "max_tokens")),
    (400, ["max_tokens"], openai(f"'max_tokens' is not supported. Use '{NEWER}' instead.")),
    (400, ["max_tokens", NEWER], openai("max_tokens is too large: 4096. This model supports at "
                                        "most 2048 completion tokens", "max_tokens")),
    (400, ["max_tokens", NEWER], {
        "object": "error", "message": "This model's maximum context length is 4096 tokens. However,"
        " you requested 4799 tokens (703 in the messages, 4096 in the completion).",
        "type": "BadRequestError", "param": None, "code": 400}),
    (400, ["temperature"], openai("Unsupported value: 'temperature' does not support 0 with this "
                                  "model. Only the default (1) value is supported.", "temperature",
                                  "unsupported_value")),
    (400, ["temperature"], {"type": "error", "error": {
        "type": "invalid_request_error", "message": "`temperature` is deprecated for m."}}),
    (422, ["temperature"], {"error": "Input validation error: `temperature` must be strictly "
                                     "positive", "error_type": "validation"}),
    (403, ["logprobs", "top_logprobs"],
     openai("You are not allowed to request logprobs from this model", code=None)),
    (400, ["logprobs", "top_logprobs"],
     openai("This model does not support the 'logprobs' parameter.", "logprobs", None)),
    (400, ["logprobs", "top_logprobs"], {"error": {
        "code": 400, "message": "Logprobs is not enabled for models/g", "status": "INVALID_ARGUMENT"
    }}),
    (400, ["logprobs", "top_logprobs"], openai("5 is greater than the maximum of 1 - 'logprobs'",
                                               "logprobs", None)),
    (400, ["logprobs", "top_logprobs"], openai("top_logprobs must be <= 3", "top_logprobs")),
    (500, ["logprobs", "top_logprobs"], {"error": {
        "code": 500, "message": "Unsupported param: logprobs", "type": "server_error"}}),
    (200, ["logprobs", "top_logprobs"], {"error": {
        "code": 400, "message": "Provider returned error",
        "metadata": {"raw": '{"detail": "logprobs are not available"}'}}}),
    (400, ["seed"], openai("Unrecognized request argument supplied: seed", code=None)),
    (422, ["seed"], {"detail": [forbidden("seed")]}),
    (422, ["seed"], {"object": "error", "message": {"detail": [forbidden("seed")]},
                     "type": "invalid_request_error", "code": None}),       # Mistral
    (422, ["seed", "logprobs", "top_logprobs"],
     {"detail": [forbidden("seed"), forbidden("logprobs"), forbidden("top_logprobs")]}),
    (400, ["seed"], {"object": "error", "message": str([forbidden("seed")]), "code": 400}),
    (400, ["seed", "logprobs", "top_logprobs"], [{"error": {
        "code": 400, "status": "INVALID_ARGUMENT", "message":
        'Unknown name "seed": Cannot find field.\nUnknown name "logprobs": Cannot find field.'}}]),
    (400, ["seed"], openai("litellm.UnsupportedParamsError: anthropic does not support parameters: "
                           "['seed'], for model=seed-oss. To drop these, set "
                           "`litellm.drop_params=True`", "None", "400"))]


@pytest.mark.parametrize("status, refused, words", REFUSALS)
def test_a_model_is_asked_again_without_what_it_refuses(server, capsys, status, refused, words):
    """At once, and from then on: no later request has it. It is said once."""
    def says(handler, route, body):
        if any(name in body for name in refused):
            return status, words, {}
        return Server.good(handler, route, body)
    server.says = says
    one = endpoint(server)
    waits = no_waiting(one)
    assert one.prefers_b(("q", "short", "a longer one")) == 1 and not waits
    first = [body for _, body, _ in server.requests]
    assert {"max_tokens", "temperature", "seed", "logprobs", "top_logprobs"} <= set(first[0])
    # the limit goes by its newer name before it is left out
    wanted = {"temperature", "seed", "logprobs", "top_logprobs", "max_tokens"} - set(refused)
    if "max_tokens" in refused and NEWER not in refused:
        wanted.add(NEWER)
    assert set(first[-1]) == wanted | {"model", "messages"}
    assert len(first) == 2 + (NEWER in refused)
    one.preferences([(str(i), "short", "a longer one") for i in range(4)])
    assert [set(b) for _, b, _ in server.requests[len(first):]] == [set(first[-1])] * 8
    out = capsys.readouterr().out
    said = out.splitlines()
    assert all(line.startswith("note: m refuses ") for line in said)
    assert len(said) == 1 and ("is sent instead" in out) == (refused == ["max_tokens"])
    assert all(name in out for name in refused)


def test_a_model_that_refuses_all_parameters_is_asked_side_by_side(server, capsys):
    """As OpenAI's reasoning models do, one parameter at a time; in 16 threads."""
    def says(handler, route, body):
        for name in ("max_tokens", "temperature", "top_logprobs", "logprobs", "seed"):
            if name in body:
                return 400, openai(f"Unsupported parameter: '{name}'", name), {}
        time.sleep(0.01)
        return Server.good(handler, route, body)
    server.says = says
    questions = [(str(i), "short", "a longer one") for i in range(20)]
    assert endpoint(server).preferences(questions) == [(1, 0)] * 20
    answered = [b for _, b, _ in server.requests if "seed" not in b]
    assert {tuple(sorted(b)) for b in answered} == {(NEWER, "messages", "model")}
    assert len(answered) == 40 and len(server.requests) <= 40 + 5 * 16
    assert capsys.readouterr().out.count("\n") == 2
    asked = len(server.requests)
    endpoint(server).preferences(questions)     # kept, under the question as it was meant
    assert len(server.requests) == asked


@pytest.mark.parametrize("status, words", [
    (400, openai("Invalid value for 'content'", "messages[0].content", None)),
    (400, openai("the prompt asks for the temperature", "messages", None)),
    (400, {"error": {"message": "This model's maximum context length is 8192 tokens",
                     "code": "context_length_exceeded"}}),
    (400, "Bad request"), (413, "too large"), (402, "you can afford fewer max_tokens"),
    (404, openai("The model `m` does not exist", None, "model_not_found")),
    # FastAPI repeats the request
    (422, {"detail": [{"type": "missing", "loc": ["body", "prompt"], "msg": "Field required",
                       "input": {"max_tokens": 1, "seed": 0, "temperature": 0}}]})])
def test_a_refusal_that_names_no_parameter_ends_the_stage_at_once(server, status, words):
    server.says = lambda *_: (status, words, {})
    text = words if isinstance(words, str) else json.loads(json.dumps(words)).get(
        "error", {}).get("message", "Field required")
    with pytest.raises(OSError, match=f"after 1 of 6 tries: HTTP {status}") as e:
        endpoint(server).prefers_b(("q", "a", "b"))
    assert len(server.requests) == 1 and text in str(e.value)


def test_a_refusal_of_something_else_is_no_refusal_of_the_parameters_in_its_words(server, capsys):
    """What it names is left out of this request only, and nothing is said of it."""
    def says(handler, route, body):
        if "bad" in body["messages"][0]["content"]:
            return 400, openai("Invalid content; max_tokens was 4096", code=None), {}
        return Server.good(handler, route, body)
    server.says = says
    one = endpoint(server)
    with pytest.raises(OSError, match="HTTP 400: Invalid content"):
        one.prefers_b(("bad", "a", "b"))
    one.error = None
    one.prefers_b(("q", "a", "b"))
    assert server.requests[-1][1]["max_tokens"] == 4096 and not capsys.readouterr().out


# ---------------------------------------------------------------- room, and what is cut off
def cut(text, reason="length", **message):
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": reason}]}


@pytest.mark.parametrize("text", ["I compare the two. It is\nA", "", None, "<think>Hm"])
def test_an_answer_that_is_cut_off_is_told_as_that_and_not_asked_for_again(server, monkeypatch,
                                                                          text):
    """Nor does it count as the letter that it happens to end in."""
    monkeypatch.setenv("ILR_JUDGE_MAX_TOKENS", "700")
    server.says = lambda *_: cut(text)
    with pytest.raises(OSError, match="cut off .finish_reason length.: raise ILR_JUDGE_MAX_TOKENS "
                       ".now 700."):
        endpoint(server).prefers_b(("q", "a", "b"))
    assert [b["max_tokens"] for _, b, _ in server.requests] == [700]
    # a judge that loops is cut off at any limit; but before a run the limit may still be raised
    monkeypatch.setenv("ILR_JUDGE_UNDECIDED", "1")
    one = endpoint(server)
    assert one.prefers_b(("q", "a", "b")) == 0.5 and one.undecided == 1
    with pytest.raises(OSError, match="cut off"):
        endpoint(server).try_out()


def test_a_limit_that_the_server_refuses_as_too_large_is_to_be_lowered(server):
    """Without it, the server's own limit cuts the answer off."""
    def says(handler, route, body):
        if {"max_tokens", NEWER} & set(body):
            return 400, openai("max_tokens is too large: 4096", "max_tokens"), {}
        return cut("Hm")
    server.says = says
    with pytest.raises(OSError, match="server refuses ILR_JUDGE_MAX_TOKENS .4096.: lower it"):
        endpoint(server).prefers_b(("q", "a", "b"))


def test_openai_says_in_an_error_that_there_was_no_room(server):
    server.says = lambda *_: (400, openai(
        "Could not finish the message because max_tokens or model output limit was reached. Please "
        "try again with higher max_tokens.", None, None), {})
    with pytest.raises(OSError, match="after 1 of 6 tries: .* raise ILR_JUDGE_MAX_TOKENS .now 40"):
        endpoint(server).prefers_b(("q", "a", "b"))
    assert len(server.requests) == 1


def test_a_model_without_a_temperature_may_be_shorter_the_next_time(server):
    def says(handler, route, body):
        if "temperature" in body:
            return 400, openai("Unsupported value", "temperature"), {}
        return cut("Hm") if len(server.requests) < 4 else ANSWER
    server.says = says
    assert endpoint(server).prefers_b(("q", "a", "b")) == 0 and len(server.requests) == 4


def test_more_room_asks_nothing_again_that_is_answered(server, monkeypatch):
    def says(handler, route, body):
        long = "hard" in str(body) and body["max_tokens"] < 9000
        return cut("Hm") if long else Server.good(handler, route, body)
    server.says = says
    endpoint(server).preferences([("q", "short", "a longer one")])
    assert {b["max_tokens"] for _, b, _ in server.requests} == {4096}
    questions = [("q", "short", "a longer one"), ("hard", "short", "a longer one")]
    with pytest.raises(OSError, match="raise ILR_JUDGE_MAX_TOKENS"):
        endpoint(server).preferences(questions)
    monkeypatch.setenv("ILR_JUDGE_MAX_TOKENS", "9000")
    assert endpoint(server).preferences(questions) == [(1, 0)] * 2
    assert len([b for _, b, _ in server.requests if "hard" not in str(b)]) == 2


REFUSED = [cut(None, "stop", refusal="I will not."), cut("", "content_filter"),
           cut("A", "content_filter"),
           (400, openai("The response was filtered due to the prompt triggering Azure OpenAI's "
                        "content management policy.", "prompt", "content_filter"), {})]


@pytest.mark.parametrize("says", REFUSED)
def test_a_refusal_to_answer_is_told_as_that_and_may_be_undecided(server, monkeypatch, says):
    monkeypatch.setattr(core.endpoint, "ATTEMPTS", 2)
    server.says = lambda *_: says
    with pytest.raises(OSError, match="refused|content_filter"):
        endpoint(server).prefers_b(("q", "a", "b"))
    monkeypatch.setenv("ILR_JUDGE_UNDECIDED", "1")
    one = endpoint(server)
    assert one.prefers_b(("q", "a", "b")) == 0.5 and one.undecided == 1


@pytest.mark.parametrize("text", ["", None, " \n", "<think>Hm</think>", "<think>Hm"])
def test_an_answer_that_is_always_empty_may_be_undecided(server, monkeypatch, text):
    """Where the server says that it is finished. It is asked for again after growing waits."""
    monkeypatch.setattr(core.endpoint, "LONGEST_WAIT", 60)
    server.says = lambda *_: cut(text, "stop")
    with pytest.raises(OSError, match="after 6 of 6 tries: a reply without an answer"):
        one = endpoint(server)
        waits = no_waiting(one)
        one.prefers_b(("q", "a", "b"))
    assert len(waits) == 5 and waits[-1] >= 8
    monkeypatch.setenv("ILR_JUDGE_UNDECIDED", "1")
    one = endpoint(server)
    no_waiting(one)
    assert one.prefers_b(("q", "a", "b")) == 0.5 and one.undecided == 1


@pytest.mark.parametrize("error", [{"code": 0, "message": ""}, {"code": None}, {}, "", False, None])
def test_an_error_that_says_nothing_beside_an_answer_is_none(server, error):
    server.says = lambda *_: {**ANSWER, "error": error}
    assert endpoint(server).prefers_b(("q", "a", "b")) == 0 and len(server.requests) == 1


# ---------------------------------------------------------------- waiting
TOMORROW = datetime.now(UTC) + timedelta(days=1)


@pytest.mark.parametrize("headers, low, high", [
    ({"Retry-After": "7"}, 7, 7), ({"Retry-After": "1.5"}, 1.5, 1.5),
    ({"Retry-After": " 2. "}, 2, 2), ({"Retry-After": "99999999"}, 99999999, 99999999),
    ({"retry-after-ms": "1250"}, 1.25, 1.25), ({"retry-after-ms": "x", "Retry-After": "3"}, 3, 3),
    # the three forms of a date in HTTP
    ({"Retry-After": TOMORROW.strftime("%a, %d %b %Y %H:%M:%S GMT")}, 80000, 86400),
    ({"Retry-After": TOMORROW.strftime("%A, %d-%b-%y %H:%M:%S GMT")}, 80000, 86400),
    ({"Retry-After": TOMORROW.ctime()}, 80000, 86400),
    ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0, 0), ({"Retry-After": "-5"}, 0, 0),
    ({"Retry-After": "soon"}, 0, 0), ({"Retry-After": ""}, 0, 0),
    ({"Retry-After": "1e3"}, 1e3, 1e3),
    ({"Retry-After": "1m30s"}, 90, 90), ({"retry-after-ms": "500ms"}, 0.5, 0.5),
    ({"Retry-After": "inf"}, 0, 0),
    ({"Retry-After": "nan"}, 0, 0), ({"Retry-After": "\u00b2"}, 0, 0), ({}, 0, 0)])
def test_every_form_of_retry_after(headers, low, high):
    message = Message()
    for name, value in headers.items():
        message[name] = value
    assert low <= core.server.wait_asked(message, "") <= high


@pytest.mark.parametrize("words, seconds", [
    ('{"retryDelay": "34s"}', 34), ("Please try again in 590ms.", 0.59), ("retry after 2 s", 2),
    ("Please try again in 1m30s. Visit", 90), ("Please try again in 6m0s.", 360),
    ("Please try again in 1h2m3.5s", 3723.5), ("try again in 12 minutes", 720),
    ("Please retry in 34.074824224s.", 34.074824224), ("wait 2 minutes and 5 seconds", 125),
    ("Try again after 250 milliseconds", 0.25), ("Limit resets in: 30s", 30),
    ('{"retry_after": 20.5}', 20.5), ("Retry after 1 hour", 3600), ("RETRY IN 5 SEC", 5),
    ("try again later. Limit: 30 s", 0), ("rate limit of 3 / min reached", 0),
    ("try again in a minute", 0)])
def test_a_wait_that_stands_in_the_words(words, seconds):
    assert core.server.wait_asked(Message(), words) == pytest.approx(seconds, abs=1e-9)


def test_a_busy_server_is_given_the_time_that_it_asks_for(server, monkeypatch):
    monkeypatch.setattr(core.endpoint, "LONGEST_WAIT", 60)
    date = TOMORROW.strftime("%a, %d %b %Y %H:%M:%S GMT")
    for says, least, most in (((429, "busy", {"Retry-After": "20"}), 20, 20),
                              ((503, "busy", {"Retry-After": "2.5"}), 2.5, 16),
                              ((429, "busy", {"Retry-After": date}), 60, 60)):
        server.says = lambda *_, says=says: says
        one = endpoint(server)
        waits = no_waiting(one)
        with pytest.raises(OSError, match="busy"):
            one.prefers_b(("q", "a", "b"))
        assert len(waits) == 5 and all(least <= wait <= most for wait in waits)


# ---------------------------------------------------------------- ways to the server
@pytest.mark.parametrize("host, here", [
    ("localhost", True), ("LOCALHOST", True), ("localhost.", True), ("a.localhost", True),
    ("127.0.0.1", True), ("127.9.9.9", True), ("[::1]", True), ("[::ffff:127.0.0.1]", True),
    ("0.0.0.0", True), ("[::]", True), (socket.gethostname(), True), ("10.0.0.1", False),
    ("localhost.example.org", False), ("api.openai.com", False), ("128.0.0.1", False)])
def test_what_is_this_machine(host, here):
    assert core.server.is_here(f"http://{host}:8000/v1") == here


def test_a_proxy_is_used_but_not_for_this_machine(server, monkeypatch):
    """A real proxy, which records what it is asked to fetch."""
    proxy = Server()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.http.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    one = endpoint(server)
    assert one.prefers_b(("q", "short", "a longer one")) == 1
    assert len(server.requests) == 1 and not proxy.requests
    far = core.endpoint.Endpoint("http://judge.invalid/v1", "m", "ILR_JUDGE")
    assert far.prefers_b(("q", "short", "a longer one")) == 1
    assert [path for path, _, _ in proxy.requests] == ["http://judge.invalid/v1/chat/completions"]
    monkeypatch.setenv("no_proxy", "judge.invalid")
    monkeypatch.setattr(core.endpoint, "ATTEMPTS", 1)
    with pytest.raises(OSError, match="after 1 of 1 tries"):
        core.endpoint.Endpoint("http://judge.invalid/v1", "n", "ILR_JUDGE").prefers_b(("q",) * 3)
    assert len(proxy.requests) == 1
    proxy.http.shutdown()
    proxy.http.server_close()


def test_a_url_of_ipv6_and_one_with_a_slash_at_its_end(server, monkeypatch):
    server.url += "/"
    assert endpoint(server).prefers_b(("q", "short", "a longer one")) == 1
    try:
        six = Server("::1")
    except OSError:
        pytest.skip("no IPv6 here")
    assert endpoint(six).prefers_b(("q", "short", "a longer one")) == 1
    six.http.shutdown()
    six.http.server_close()


@pytest.mark.parametrize("says", [(404, "404 page not found", {}), (405, "", {}),
                                  (200, "<!doctype html><title>Web UI</title>", {}),
                                  {"error": "Unexpected endpoint or method. (POST /chat)"}])
def test_a_url_without_v1_is_told_of(server, monkeypatch, says):
    monkeypatch.setattr(core.endpoint, "ATTEMPTS", 1)
    server.says = lambda *_: says
    with pytest.raises(OSError) as e:
        endpoint(server).prefers_b(("q", "a", "b"))
    assert "ends in /v1" not in str(e.value)
    server.url = server.url.removesuffix("/v1")
    with pytest.raises(OSError, match="as a rule the URL ends in /v1$"):
        endpoint(server).prefers_b(("q", "a", "b"))


def test_replies_that_come_in_other_ways(server):
    """Packed; in pieces, of which the last is missing; cut off before their announced end."""
    def says(handler, route, body):
        n, data = len(server.requests), json.dumps(ANSWER).encode()
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        if n == 1:
            handler.send_header("Content-Length", str(len(data) + 10))
            data = data[:-5]
        elif n == 2:
            handler.send_header("Transfer-Encoding", "chunked")
            data = b"%x\r\n%s\r\n" % (len(data), data)
        else:
            data = gzip.compress(data)
            handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(data)
        handler.close_connection = True
    server.says = says
    assert endpoint(server).prefers_b(("q", "a", "b")) == 0 and len(server.requests) == 3


def test_https_to_a_server_that_speaks_http_is_told_at_once_in_one_line(server):
    server.url = server.url.replace("http:", "https:")
    with pytest.raises(OSError, match="after 1 of 6 tries: .*(?i:wrong.version)") as e:
        endpoint(server).prefers_b(("q", "a", "b"))
    assert "\n" not in str(e.value)


def test_the_words_of_a_page_are_shortened_and_the_key_is_hidden(server, monkeypatch):
    monkeypatch.setattr(core.endpoint, "ATTEMPTS", 1)
    page = ("<html><head><style>body {}</style><script>alert(1)</script></head><body>\n<h1>503 "
            "Service Unavailable</h1>" + "<p>sk-secret</p>" * 9999 + "</body></html>")
    server.says = lambda *_: (503, page, {})
    with pytest.raises(OSError, match="HTTP 503: 503 Service Unavailable .key. .key.") as e:
        endpoint(server).prefers_b(("q", "a", "b"))
    assert len(str(e.value)) < 600 and not re.search("[<>]|sk-|alert", str(e.value))


# ---------------------------------------------------------------- the try before a run
def test_the_try_asks_whatever_is_kept_and_keeps_its_reply(server):
    for _ in range(2):
        endpoint(server).try_out()
    assert len(server.requests) == 2
    endpoint(server).preferences([core.verdict.TRIAL])      # as tasks/saferpaca.py does
    assert len(server.requests) == 3
    core.endpoint.embedder(server.url).try_out()
    assert server.requests[-1][0] == "/v1/embeddings"


@pytest.mark.parametrize("says", [(503, "down", {"Retry-After": "60"}), (401, "no", {}),
                                  chat("I cannot say."), cut("Hm"), {"error": "down"}])
def test_a_judge_that_fails_at_the_try_is_told_of_within_seconds(server, monkeypatch, says):
    monkeypatch.setattr(core.endpoint, "LONGEST_WAIT", 60)
    server.says = lambda *_: says
    one = endpoint(server)
    waits = no_waiting(one)
    with pytest.raises(OSError, match="of 3 tries"):
        one.try_out()
    assert len(server.requests) <= 3 and sum(waits) <= 5


RUN = """set -euo pipefail
caller=$PWD here=$(cd "$(dirname "$0")" && pwd)
. "$here/core/stages.sh"
at=seed_0 data=$OUT/seed_0/data
stage data tasks/arithmetic.py --out "$data" --train 40 --gt 20 --test 10 --seed 0
stage compare compare.py score --judge "$JUDGE" --judge-model m --task arithmetic \\
  --a "$data/gt.jsonl" --b "$data/gt.jsonl" --out "$OUT/seed_0/comparisons.jsonl"
stage again compare.py score --judge "$JUDGE" --judge-model m --task arithmetic \\
  --a "$data/test.jsonl" --b "$data/test.jsonl" --out "$OUT/seed_0/again.jsonl"
run_plan
"""


def test_a_run_asks_its_judge_once_before_its_first_stage(server, tmp_path):
    """A judge that cannot answer ends it in one line, with nothing made. What is complete, or only
    shown, asks nothing. Nothing but the try is asked here: all the pairs agree."""
    top = house_in(tmp_path)
    (top / "small.sh").write_text(RUN)
    run = functools.partial(call, tmp_path / "run", tmp_path / "bases", script="small.sh", root=top,
                            JUDGE=server.url, JUDGE_MODEL="m", ILR_COMPARE_KEY="sk-compare",
                            ILR_CACHE=tmp_path / "cache")
    assert run("--dry-run").returncode == 0 and not server.requests
    server.says = lambda *_: (401, {"error": {"message": "no such key: sk-compare"}}, {})
    failed = run()
    assert failed.returncode == 1 and len(server.requests) == 1
    assert re.fullmatch(r"run_ilr.sh: error: asked once before anything is trained: http\S+ \(m\), "
                        r"after 1 of 3 tries: ILR_COMPARE_KEY is refused: HTTP 401: no such key: "
                        r"\[key\]\n", failed.stderr), failed.stderr
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {".lock"}
    server.says = Server.good
    done = run()
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert len(server.requests) == 2 and (tmp_path / "run/seed_0/again.jsonl").exists()
    server.says = lambda *_: (401, "", {})
    assert run().returncode == 0 and len(server.requests) == 2
    # what another run has made is taken over, though its judge is gone
    taken = call(tmp_path / "two", tmp_path / "bases", script="small.sh", root=top,
                 JUDGE=server.url, JUDGE_MODEL="m", FROM=tmp_path / "run")
    assert taken.returncode == 0 and taken.stdout.count(": taken over from ") == 3
    assert len(server.requests) == 2


def test_an_interrupt_ends_a_run_that_waits_for_its_judge(server, tmp_path):
    top, waiting = house_in(tmp_path), threading.Event()
    (top / "small.sh").write_text(RUN)
    server.says = lambda *_: waiting.wait(60) and None
    process = subprocess.Popen(
        ["bash", "small.sh"], cwd=top, stderr=subprocess.PIPE, text=True,
        env=environment(tmp_path / "run", tmp_path / "bases", JUDGE=server.url, JUDGE_MODEL="m"),
        # a background job may ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not server.requests:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(40) == 130
    assert process.stderr.read() == ("run_ilr.sh: error: interrupted; the same command continues "
                                     "from here\n")
    waiting.set()


def test_which_endpoints_a_stage_asks(server, monkeypatch):
    def asked(stage, *argv):
        args = stage.parser().parse_args([str(a) for a in argv])
        return [(e.url, e.model, e.prefix) for e in stage.endpoints(args)]
    monkeypatch.setenv("ILR_EMBEDDER_MODEL", "e")
    score = ["score", "--a", "a", "--b", "b", "--out", "c", "--judge-model", "j", "--judge"]
    judge, embeds = (server.url, "j", "ILR_COMPARE"), (server.url, "e", "ILR_EMBEDDER")
    assert asked(compare, *score, server.url, "--task", "arithmetic") == [judge]
    assert asked(compare, *score, server.url, "--embedder", server.url, "--task", "saferpaca"
                 ) == [judge, embeds]
    assert asked(compare, *score, "oracle", "--embedder", server.url, "--task", "saferpaca"
                 ) == [embeds]
    assert asked(compare, *score, "folder", "--embedder", "folder", "--task", "saferpaca") == []
    assert asked(compare, "train", "--model", "m", "--task", "saferpaca", "--data", "d", "--gold",
                 "g", "--out", "o") == []
    grade = ["grade", "--data", "d", "--task"]
    assert asked(evaluate, *grade, "saferpaca") == [(server.url, "m", "ILR_JUDGE")]
    assert asked(evaluate, *grade, "arithmetic") == asked(evaluate, "report", "r") == []
