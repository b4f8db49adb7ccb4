"""An OpenAI-compatible endpoint that grades, compares or embeds. Needs no library.

    grades (tasks/saferpaca.py)                        ILR_JUDGE_URL ILR_JUDGE_MODEL ILR_JUDGE_KEY
    compare.py score --judge URL --judge-model NAME    ILR_COMPARE_KEY
    compare.py score --embedder URL                    ILR_EMBEDDER_MODEL ILR_EMBEDDER_KEY

A URL is, for example, https://api.openai.com/v1, and a model gpt-4o. Each key is sent to the URL
in its row and nowhere else; leave it out if the server needs none.

Replies are kept in the folder ILR_CACHE (default: cache), under a hash of the request, and the same
request is not sent again. At most ILR_JUDGE_CONCURRENCY (16) requests run at a time. A judge has
room for ILR_JUDGE_MAX_TOKENS (4096) tokens, its reasoning included. With ILR_JUDGE_UNDECIDED=1 a
judge whose answers hold no verdict counts as 0.5 instead of as an error.

core/server.py sends one request, core/verdict.py reads what a judge says.
"""
import contextlib
import hashlib
import json
import math
import os
import queue
import random
import re
import threading
import time
import urllib.parse
from pathlib import Path

from core.cli import printable
from core.records import InputError, dumps
from core.server import OUT_OF_ROOM, ServerError, opener_for, post
from core.tokens import question_of
from core.verdict import QUESTION, TRIAL, CutOff, Undecided, Unreadable, probability_of_b

ATTEMPTS = 6                # tries of a request
TIMEOUT, LONGEST_WAIT = 300, 60     # seconds: of a try; between two tries
# Before a run starts, a server that is down is told of within seconds.
TRIAL_ATTEMPTS, TRIAL_SECONDS = 3, 10


def is_url(name):
    """Whether --judge or --embedder names an endpoint, not a folder."""
    return name.startswith(("http://", "https://"))


def check_url(url):
    """Raise InputError unless the URL is http(s)://host/path, with nothing secret in it."""
    try:
        good = re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", url)
        parts = urllib.parse.urlsplit(url)
        # a host without an ASCII form raises UnicodeError, a ValueError
        good = good and url.isascii() and parts.port != 0 and parts.hostname.encode("idna")
    except ValueError:
        good = False
    if not good:
        raise InputError("the endpoint's URL: expected http(s)://host/..., "
                         "without a user, a key or a query in it")
    if url.rstrip("/").endswith(("/chat/completions", "/embeddings")):
        raise InputError("the endpoint's URL ends before /chat/completions or /embeddings, "
                         "as a rule in /v1")


def number(name, default, most):
    """An environment variable that is a whole number from 1 to `most`."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        raise InputError(f"{name} must be a number from 1 to {most}")
    return int(text)


def embedder(url):
    """The endpoint that embeds behind --embedder URL."""
    model = os.environ.get("ILR_EMBEDDER_MODEL", "text-embedding-3-large")
    return Endpoint(url, model, "ILR_EMBEDDER")


class Endpoint:
    """An OpenAI-compatible server at `url`; its key is the environment variable `{prefix}_KEY`.

    model: the name that the server knows the model by. Raises InputError for bad settings.
    """

    def __init__(self, url, model, prefix):
        check_url(url)
        if not model:
            name = f"{prefix}_MODEL"
            if prefix == "ILR_COMPARE":
                name = "--judge-model (JUDGE_MODEL of run_ilr.sh)"
            raise InputError(f"the model behind {url} has no name: set {name}")
        self.url, self.model, self.prefix = url.rstrip("/"), model, prefix
        self.key = os.environ.get(f"{prefix}_KEY", "")
        if not self.key.isascii() or re.search(r"\s", self.key):
            raise InputError(f"{prefix}_KEY must be a word of ASCII")
        self.concurrency = number("ILR_JUDGE_CONCURRENCY", 16, 1000)
        self.room = number("ILR_JUDGE_MAX_TOKENS", 4096, 10**6)
        self.opener = opener_for(self.url)
        self.stop, self.error = threading.Event(), None     # set by the first request that fails
        self.refused, self.lock = set(), threading.Lock()   # names of parameters
        self.undecided = 0      # replies without a verdict that counted as 0.5

    # ---------------------------------------------------------------- one request
    def ask(self, route, body, read, about="", undecided=None, trial=False):
        """read(reply) of one request's reply, from the cache if it was asked before.

        about: what the request is about, for errors. Raises OSError as `tries` does. For answers
        without a verdict, and with ILR_JUDGE_UNDECIDED=1, returns `undecided`, if given. trial: ask
        whatever the cache holds, and give up soon.
        """
        # Neither the limit that is really sent nor what the model refuses is part of the question:
        # a reply that is there stays good.
        key = json.dumps([self.url, route, body], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        path = Path(os.environ.get("ILR_CACHE") or "cache", digest[:2], f"{digest}.json")
        if not trial:
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                return json.loads(path.read_text(encoding="utf-8"))["value"]
        may_be_undecided = undecided is not None and os.environ.get("ILR_JUDGE_UNDECIDED") == "1"
        value = self.tries(route, body, read, about, may_be_undecided, trial)
        if value is None:
            self.undecided += 1
            return undecided        # not cached: on another day it may decide
        # another process or thread may write the same file
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(dumps({"asked": body, "value": value}) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as e:
            raise OSError(f"ILR_CACHE, {path}: {e.strerror}") from None
        return value

    def tries(self, route, body, read, about, may_be_undecided, trial):
        """read(reply) of a request; None for an answer without a verdict, if it may be undecided.

        A busy or failing server is asked again after a growing wait, and so is one whose reply is
        Unreadable. Raises OSError after ATTEMPTS tries, or at once where another try is no use.
        """
        attempts = min(TRIAL_ATTEMPTS, ATTEMPTS) if trial else ATTEMPTS
        longest = min(TRIAL_SECONDS / 4, LONGEST_WAIT) if trial else LONGEST_WAIT
        attempt, began, refused = 0, time.monotonic(), set()
        while True:
            if self.error:
                raise self.error
            last = attempt + 1 == attempts or trial and time.monotonic() - began > TRIAL_SECONDS
            # a random part, so that concurrent requests do not all come back at once
            wait = min(longest, 2 ** attempt) * random.uniform(0.5, 1)
            sent = self.taken(body, attempt, refused)
            room = self.room_in(sent)
            try:
                reply = post(self.opener, f"{self.url}/{route}", self.key, sent, TIMEOUT)
                self.leave_out(refused)     # known to be the cause
                return read(reply)
            except ServerError as e:
                if found := e.refused(sent):
                    refused.update(found)
                    continue        # again, at once
                error, last, wait = str(e), last or not e.passes(), max(wait, min(longest, e.wait))
                if OUT_OF_ROOM in e.words:
                    error += f": {room}"
                elif e.filtered():
                    if may_be_undecided:
                        return None
                elif e.status in (401, 403):
                    state = "is refused" if self.key else "is not set"
                    error = f"{self.prefix}_KEY {state}: {error}"
            except Undecided as e:
                if last and may_be_undecided:
                    return None
                error = f"{e} (asked about {about[:60]!r})"
                wait = wait if e.waits else 0
            except CutOff as e:
                if may_be_undecided and not trial:      # one that loops is cut off at any limit
                    return None
                error, wait = f"{e}: {room}", 0
                last = last or "temperature" in sent        # 0: it would be the same again
            except Unreadable as e:
                error = str(e)
            except OSError as e:
                reason = getattr(e, "reason", None) or e
                error = str(reason) or type(e).__name__
                last = last or "CERTIFICATE_" in error or "WRONG_VERSION" in error      # of TLS
            if last:
                self.fail(f"{attempt + 1} of {attempts} tries", error)
            self.stop.wait(wait)
            attempt += 1

    def taken(self, body, attempt, refused):
        """The body as it is sent: with this run's limit, and without what the model refuses, in
        this request or before."""
        sent, refused = dict(body), refused | self.refused
        if "max_tokens" in body:
            sent["max_tokens"] = sent["max_completion_tokens"] = self.room
            # the newer name only for models that refuse the old one
            if "max_tokens" not in refused:
                del sent["max_completion_tokens"]
        if "seed" in body:      # another seed, or the reply would be the same again
            sent["seed"] = attempt
        return {name: value for name, value in sent.items() if name not in refused}

    def room_in(self, sent):
        """What helps against an answer that is cut off."""
        if {"max_tokens", "max_completion_tokens"} & set(sent):
            return f"raise ILR_JUDGE_MAX_TOKENS (now {self.room})"
        return f"the server refuses ILR_JUDGE_MAX_TOKENS ({self.room}): lower it"

    def leave_out(self, refused):
        """Send these parameters in no further request of this endpoint; say so once."""
        with self.lock:
            new = sorted(refused - self.refused)
            self.refused = self.refused | refused
        if "max_tokens" in new and "max_completion_tokens" not in new:
            new.remove("max_tokens")
            print(f"note: {self.model} refuses max_tokens: max_completion_tokens is sent instead")
        if new:
            print(f"note: {self.model} refuses {', '.join(new)}: asked without")

    def fail(self, tries, error):
        """Raise the OSError that ends all requests of this endpoint; its text hides the key."""
        text = printable(" ".join(error.replace(self.key or "\0", "[key]").split()))
        text = text if len(text) < 400 else f"{text[:200]} ... {text[-200:]}"
        wrong_place = re.search("HTTP 40[45]|not JSON|[Uu]nexpected endpoint", text)
        if wrong_place and not re.search(r"/v[0-9]", self.url):
            text += "; as a rule the URL ends in /v1"
        self.error = self.error or OSError(f"{self.url} ({self.model}), after {tries}: {text}")
        raise self.error

    def ask_all(self, function, items, desc):
        """[function(item) for item in items], in concurrent threads. The first error ends all."""
        from tqdm import tqdm
        items, todo, done = list(items), queue.SimpleQueue(), queue.SimpleQueue()
        for job in enumerate(items):
            todo.put(job)

        def work():
            with contextlib.suppress(queue.Empty):
                while not self.error:
                    i, item = todo.get_nowait()
                    try:
                        done.put((i, function(item), None))
                    except BaseException as e:
                        done.put((i, None, e))
        results = [None] * len(items)
        for _ in range(min(self.concurrency, len(items))):
            # daemon: a pending request does not keep the program from ending
            threading.Thread(target=work, daemon=True).start()
        bar = tqdm(items, desc=desc, unit="request", mininterval=1, disable=len(items) < 2)
        try:
            for _ in bar:
                i, results[i], error = done.get()
                if error:
                    raise error
        except BaseException as e:
            self.error = self.error or e
            self.stop.set()
            raise
        return results

    # ---------------------------------------------------------------- questions
    def embedding(self, text, trial=False):
        """The embedding of a text, a list of floats."""
        def read(reply):
            try:
                vector = [float(x) for x in reply["data"][0]["embedding"]]
            except (KeyError, IndexError, TypeError, ValueError):
                vector = []
            if not any(vector) or not all(map(math.isfinite, vector)):
                raise Unreadable(f"a reply without an embedding: {dumps(reply)[:300]}")
            return vector
        return self.ask("embeddings", {"model": self.model, "input": [text]}, read, trial=trial)

    def embeddings(self, texts):
        """{text: embedding} of different texts.

        Line breaks become spaces, as in the release (experiments/ilr.py).
        """
        # some servers refuse an empty input
        plain = {text: text.replace("\n", " ") or " " for text in texts}
        asked = list(dict.fromkeys(plain.values()))
        found = dict(zip(asked, self.ask_all(self.embedding, asked, "embed"), strict=True))
        return {text: found[plain[text]] for text in texts}

    def prefers_b(self, question, trial=False):
        """P(B is better) of a question (prompt, a, b); 0.5 for undecided, if that may be."""
        prompt, a, b = question
        content = QUESTION.format(prompt=question_of(prompt), a=a, b=b)
        # `taken` puts this run's limit in the place of max_tokens
        body = {"model": self.model, "messages": [{"role": "user", "content": content}],
                "max_tokens": 512, "temperature": 0, "seed": 0, "logprobs": True, "top_logprobs": 5}
        return self.ask("chat/completions", body, probability_of_b, about=prompt, undecided=0.5,
                        trial=trial)

    def preferences(self, questions):
        """Ask which of two answers is better, in both orders.

        questions: [(prompt, a, b)]. Returns [(P(B | A=a, B=b), P(B | A=b, B=a))], in their order.
        """
        questions = [(question_of(prompt) if isinstance(prompt, list) else prompt, a, b)
                     for prompt, a, b in questions]
        orders = [x for prompt, a, b in questions for x in ((prompt, a, b), (prompt, b, a))]
        both = list(dict.fromkeys(orders))
        said = dict(zip(both, self.ask_all(self.prefers_b, both, "judge"), strict=True))
        if self.undecided:
            print(f"{self.undecided} of {len(both)} replies without a verdict count as 0.5 "
                  "(ILR_JUDGE_UNDECIDED=1)")
        return [(said[prompt, a, b], said[prompt, b, a]) for prompt, a, b in questions]

    def try_out(self):
        """Ask one question now, whatever the cache holds. Raises OSError, within seconds if there
        is no server, where `embeddings` or `preferences` would."""
        if self.prefix == "ILR_EMBEDDER":
            self.embedding(TRIAL[0], trial=True)
        else:
            self.prefers_b(TRIAL, trial=True)
