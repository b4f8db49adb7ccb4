"""An OpenAI-compatible server of this machine, for tests."""
import contextlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import core.endpoint
from tasks import saferpaca

ASKED = re.compile(r"<request>\n(.*)\n</request>\n\n<answer_A>\n(.*)\n</answer_A>\n\n"
                   r"<answer_B>\n(.*)\n</answer_B>", re.S)


def better(prompt, a, b):
    """The server's taste: the longer answer; of equally long ones the first it reads."""
    return "B" if len(b) > len(a) else "A"


def chat(text, top=None):
    choice = {"message": {"role": "assistant", "content": text}}
    if top:
        likely = [{"token": t, "logprob": p} for t, p in top.items()]
        choice["logprobs"] = {"content": [
            {"token": "So", "logprob": 0, "top_logprobs": []},
            {"token": text[-1], "logprob": -0.1, "top_logprobs": likely}]}
    return {"choices": [choice]}


class Server:
    """An OpenAI-compatible server.

    says(handler, route, body) makes each reply: an object, (status, text, headers), or None.
    """

    def __init__(self, host="127.0.0.1"):
        self.requests, self.at_once, self.most = [], 0, 0
        self.says, self.lock = self.good, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, body, dict(self.headers)))
                    outer.at_once += 1
                    outer.most = max(outer.most, outer.at_once)
                try:
                    said = outer.says(self, self.path, body)
                finally:
                    with outer.lock:
                        outer.at_once -= 1
                if said is None:
                    return
                status, text, headers = said if isinstance(
                    said, tuple) else (200, json.dumps(said), {})
                if not isinstance(text, str):
                    text = json.dumps(text)
                with contextlib.suppress(OSError):      # a client that has given up
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())

        class Listens(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.http = Listens((host, 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.http.server_port}/v1"

    @staticmethod
    def good(handler, route, body):
        if route == "/v1/embeddings":
            text, = body["input"]
            counts = [float(text.count(c)) + 0.01 for c in "abcdefghijklmnopqrstuvwxyz"]
            return {"data": [{"embedding": counts}]}
        return chat("Both are fair.\n"
                    + better(*ASKED.search(body["messages"][0]["content"]).groups()))


@pytest.fixture()
def server(tmp_path, monkeypatch):
    server = Server()
    monkeypatch.setenv("ILR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ILR_JUDGE_URL", server.url)
    monkeypatch.setenv("ILR_JUDGE_MODEL", "m")
    monkeypatch.setenv("ILR_JUDGE_KEY", "sk-secret")
    monkeypatch.setenv("ILR_COMPARE_KEY", "sk-compare")
    monkeypatch.setattr(saferpaca, "grades", {})
    monkeypatch.setattr(core.endpoint, "LONGEST_WAIT", 0.05)
    yield server
    server.http.shutdown()
    server.http.server_close()


def endpoint(server):
    return core.endpoint.Endpoint(server.url, "m", "ILR_JUDGE")
