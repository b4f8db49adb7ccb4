"""One request to an OpenAI-compatible server: its reply, or what it says instead of one.

Servers fail in many ways: by a status; by an error in a reply with status 200 (OpenRouter, LiteLLM,
LM Studio) or in its first choice; by a list that holds one error (Gemini). `post` makes one
exception of these, ServerError.
"""
import contextlib
import datetime
import email.utils
import http.client
import ipaddress
import json
import math
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib

from core.records import dumps

MAX_REPLY = 16 << 20        # bytes
MAX_WORDS = 4000            # characters of a failing server's words
# Parameters that a request can do without, and how servers name them when they refuse them:
# 'top_logprobs', maxOutputTokens, "Logprobs is not enabled". vLLM, of a limit that does not fit
# the context: "(3703 in the messages, 512 in the completion)".
LIMIT, LOGPROBS = r"max_?(completion_?|output_?|new_?)?tokens|in the completion", r"log[ _]?prob"
OPTIONAL = {"max_tokens": LIMIT, "max_completion_tokens": LIMIT, "temperature": "temperature",
            "seed": r"\bseed\b", "logprobs": LOGPROBS, "top_logprobs": LOGPROBS}
# The status that the type, code or status of an error in a reply stands for; else 503.
KINDS = ((r"rate.?limit|quota|exhausted|overload|unavailable|timeout|server|internal", 503),
         (r"auth|api.?key|credential", 401), (r"permission|forbidden$", 403),
         (r"not.?found", 404),
         (r"invalid.?(request|arg|param)|bad.?request|unsupported|unprocessable|content.?filter",
          400))
# Ends of an answer that the server has broken off (DeepSeek, vLLM, Zhipu).
FAILED = ("error", "abort", "insufficient_system_resource", "network_error")
# How words ask to wait. Gemini: "retryDelay": "34s"; OpenAI: Please try again in 1m30s; others:
# wait 12 minutes and 5 seconds; "retry_after": 20
NUMBER = r"([0-9]{1,9}(?:\.[0-9]{1,30})?)"
TIME = NUMBER + r" ?(ms|mil|[smhd])[a-z]*[ ,]*(?:and )?"
ASKS = re.compile(rf"(?i)(?:retry|again|wait|reset)[^0-9.,;]{{0,20}}((?:{TIME})+)|"
                  rf"retry[ _-]?after\W+{NUMBER}")
UNITS = {"ms": 1e-3, "mil": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}
OUT_OF_ROOM = "output limit was reached"        # OpenAI, of max_tokens that leave no answer
# A provider that does not let its model see a request (Azure, OpenRouter).
FILTERED = re.compile(r"content.?filter|content.?management.?policy|was flagged", re.I)


class ServerError(OSError):
    """The server says that it does not answer.

    status: HTTP's, or what stands for it in a reply with status 200. words: the server's own.
    wait: seconds that it asks to wait. param: the parameter that it names as the cause, or None.
    """

    def __init__(self, status, words, wait=0.0, param=None, in_reply=False):
        super().__init__(f"{'an error in a reply' if in_reply else 'HTTP'} {status}: {words}")
        self.status, self.words, self.param, self.wait = status, words, param, wait

    def passes(self):
        """Whether it may be gone at the next try."""
        return self.status in (408, 409, 425, 429) or self.status >= 500

    def filtered(self):
        """Whether it is about this one request, which a filter holds back."""
        return self.status in (400, 403) and FILTERED.search(self.words)

    def refused(self, sent):
        """The names of the parameters of the request `sent` that the server refuses."""
        if OUT_OF_ROOM in self.words:
            return []
        unsupported = re.search("unsupported|not support", self.words, re.I)
        if self.status not in (400, 403, 416, 422, *((500, 501) if unsupported else ())):
            return []
        if isinstance(self.param, str) and self.param in sent:
            named = self.param
        else:       # a model may be called seed-oss
            named = re.sub(rf"(?<![\w-]){re.escape(sent['model'])}(?![\w-])", "", self.words)
        return [name for name, pattern in OPTIONAL.items()
                if name in sent and re.search(pattern, named, re.I)]


# ---------------------------------------------------------------- sending
class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: following one would send the key to another host."""

    def redirect_request(self, *_):
        return None


def opener_for(url):
    """What sends requests to this URL: through the environment's proxies, as urllib does
    (http_proxy, https_proxy, no_proxy), but never to this machine itself."""
    direct = [urllib.request.ProxyHandler({})] if is_here(url) else []
    return urllib.request.build_opener(NoRedirect, *direct)


def is_here(url):
    """Whether a URL's host is this machine, by its name or address."""
    host = (urllib.parse.urlsplit(url).hostname or "").rstrip(".")
    if host in ("localhost", socket.gethostname().lower()) or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def post(opener, url, key, body, timeout):
    """Send one request; return the JSON object of the reply.

    timeout: seconds. Raises ServerError, or OSError for what is no reply. Their texts hold the
    server's words, with the key in them hidden.
    """
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    deadline, data, status = time.monotonic() + timeout, b"", None
    try:
        try:
            reply = opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as e:
            reply, status = e, e.code
        with reply:
            # the status of an error counts, whatever becomes of its words
            ignored = (OSError, http.client.HTTPException) if status else ()
            with contextlib.suppress(*ignored):
                data = read_body(reply, deadline)
    except http.client.HTTPException as e:
        raise OSError(f"{type(e).__name__} from the server") from None

    text = data.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    error = error_in(value)
    if status is None and not error:
        if isinstance(value, dict):
            return value
        what = "JSON" if value is None else "a JSON object"
        raise OSError(f"the reply is not {what}: {plain(text, key)}")
    words = plain(words_of(error or value or text or reply.reason), key)
    if to := reply.headers.get("Location"):
        words += f" (to {to})"
    raise ServerError(status or status_of(error), words, wait_asked(reply.headers, words),
                      param=error.get("param") if isinstance(error, dict) else None,
                      in_reply=status is None)


def read_body(reply, deadline):
    """The bytes of a reply. Raises OSError if there are too many, or too late."""
    data = b""
    while chunk := reply.read1(1 << 16):
        data += chunk
        if len(data) > MAX_REPLY or time.monotonic() > deadline:
            raise OSError(f"a reply of more than {MAX_REPLY:,} bytes, or one that takes too long")
    if reply.headers.get("Content-Encoding") in ("gzip", "deflate"):    # though nobody asked for it
        try:
            return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, MAX_REPLY)
        except zlib.error as e:
            raise OSError(f"the reply cannot be unpacked: {e}") from None
    return data


# ---------------------------------------------------------------- reading what failed
def error_in(value):
    """The error that a reply holds in place of an answer, or None."""
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, dict):
        return None
    choice = first_choice(value)
    for error in (value.get("error"), choice.get("error")):
        # {"code": 0, "message": ""} is none
        if any(error.values()) if isinstance(error, dict) else error:
            return error
    failed = value.get("object") == "error" or choice.get("finish_reason") in FAILED
    return value if failed else None


def first_choice(reply):
    """The first choice of a chat reply, a dict that is empty if there is none."""
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice if isinstance(choice, dict) else {}


def status_of(error):
    """The HTTP status that an error in a reply stands for: 503, try again, if it does not say."""
    error = error if isinstance(error, dict) else {}
    found = [error.get(name) for name in ("code", "status", "type")]
    for code in found:
        if re.fullmatch("[45][0-9][0-9]", str(code)):
            return int(code)
    kind = " ".join(map(str, found)).lower()
    return next((status for pattern, status in KINDS if re.search(pattern, kind)), 503)


def words_of(error):
    """An error in words: its message, and what else it says as JSON."""
    if not isinstance(error, (dict, list)):
        return str(error)
    # pydantic repeats the whole request under "input"
    error = json.loads(json.dumps(error), object_hook=lambda part: {
        k: v for k, v in part.items() if k != "input" and v not in (None, "", [], {})})
    message = error.pop("message", None) if isinstance(error, dict) else None
    if not isinstance(message, str):
        return dumps({"message": message, **error} if message else error)
    return f"{message} {dumps(error)}" if error else message


def plain(text, key=""):
    """A server's words without the key, the tags of HTML and line breaks, cut to MAX_WORDS."""
    text = text.replace(key or "\0", "[key]")
    if text.lstrip().startswith("<"):
        text = re.sub(r"(?s)<(script|style)\b.*?</\1>|<[^<>]*>", " ", text[:5 * MAX_WORDS])
    return " ".join(text.split())[:MAX_WORDS]


def wait_asked(headers, words):
    """Seconds that a busy server asks to wait, in a header or in its words; 0 if it does not."""
    for name, unit in (("retry-after-ms", 1e-3), ("Retry-After", 1)):
        text = (headers.get(name) or "").strip()
        with contextlib.suppress(ValueError):
            return max(0.0, float(text) * unit) if math.isfinite(float(text)) else 0.0
        if re.fullmatch(f"(?:{TIME})+", text):
            return seconds(text)
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            date = email.utils.parsedate_to_datetime(text)
            date = date.replace(tzinfo=date.tzinfo or datetime.UTC)
            return max(0.0, date.timestamp() - time.time())
    said = ASKS.search(words)
    return (seconds(said[1]) if said[1] else float(said[said.lastindex])) if said else 0.0


def seconds(text):
    """The seconds of a duration: 590ms, 1m30s, 12 minutes."""
    return sum(float(n) * UNITS[unit.lower()] for n, unit in re.findall(f"(?i){TIME}", text))
