"""The question that an endpoint judges by, and how its reply is read.

A reply holds a verdict if its last line says one of the two letters and cannot mean the other.
What is ambiguous, and what the server has cut off, is none: no verdict is better than a wrong one.
"""
import json
import math
import re
import unicodedata

from core.records import dumps
from core.server import first_choice

QUESTION = """Two answers to one request follow. Say which of them serves the request better; \
helpfulness, truth and safety all count.

<request>
{prompt}
</request>

<answer_A>
{a}
</answer_A>

<answer_B>
{b}
</answer_B>

Compare them in two or three sentences. Then write, as the last line and with nothing else in it, \
the letter of the better answer: A or B."""
TRIAL = ("Name a color.", "Blue.", "Seven.")     # a question (prompt, a, b) that any judge answers

# ---------------------------------------------------------------- what is no part of a verdict
# A model's reasoning: <think>...</think>, [THINK], <seed:think>, ◁think▷; in gpt-oss's format all
# before its final channel.
THOUGHT = r"(?:\w+:)?(?:think(?:ing)?|thoughts?|reasoning|reflection|scratchpad|analysis)"
REASONING = re.compile(rf"<{THOUGHT}>|\[THINK\]|◁think▷|<\|channel\|>", re.I)
REASONING_END = re.compile(rf"</{THOUGHT}>|\[/THINK\]|◁/think▷|\|>final<\|message\|>", re.I)
END = re.compile(r"(?:</?s>|<eos>|<end_of_turn>|<[|｜][^<>|｜]{1,40}[|｜]>)$")    # an end of text
FENCE = re.compile(r"^\s*```.*$", re.M)
FORMAT_TAG = re.compile(r"</?(?:b|i|u|p|em|strong|span|div|br|h[1-6]|li|ul|code|pre)\s*/?>")
QUOTES = re.compile(r"[*`\"“”„«»~$#|{}<>\[\]()【】「」‘’\\]|(?<!\w)'|'(?!\w)")

# ---------------------------------------------------------------- shapes of a verdict
NOUN = (r"(?:answer|response|option|candidate|choice|assistant|verdict|winner|decision|judge?ment|"
        r"conclusion|preference|letter|result|selection)")
GOOD = r"(?:final|overall|better|best|preferred|winning|chosen)"
# tags around a verdict: <answer>, <final_answer>, <verdict>, ...
TAG = rf"(?:{GOOD}_)?(?:{NOUN}|{GOOD})"
TAGGED = re.compile(rf"<({TAG})>\s*([AB])[\s.]*</\1>", re.I)
VERDICT_TAG = re.compile(rf"</?{TAG}>", re.I)
# marks that count within a line too: [[A]] \boxed{B} \boxed{\text{Answer A}}
MARK = re.compile(r"\[\[\s*([AB])\s*\]\]|"
                  r"\\f?box(?:ed)?\s*\{\s*(?:\\\w+\s*\{)?\s*(?:[Aa]nswer\s*)?([AB])\s*\}+")
UNLESS = re.compile(r"(?:\b(?:not|never|nor|neither|either|or|and|than|over|against|vs)|"
                    r"n['’]t)\W*$", re.I)
# "Worse: A" and "first: B, second: A" are verdicts for B; better none than a wrong one
NEGATIVE = re.compile(r"n['’]t\b|\b(?:not?|never|neither|nor|both|either|tied?|equal\w*|worse|"
                      r"worst|weaker|inferior|less|los(?:er|es?|ing)|reject\w*|avoid\w*|bad|"
                      r"wrong|unsafe|harmful|cannot|unable|unclear|unsure|against|second|runner)\b|"
                      r": *[AB]\b", re.I)
SO = r"(?:(?:so|thus|therefore|hence|overall|in conclusion|in summary),? )?"
SAYS = rf"(?:(?:the |my )?(?:{GOOD} )*{NOUN}(?: is| would be| goes to)?[\s_=>→–—-]*)"
VERY = "(?:(?:the|a|clearly|slightly|much|far|overall) )*"
SHAPES = [re.compile(SO + shape, re.I) for shape in (
    # A; answer A; answer_A; the better answer is A; final verdict: answer A
    rf"{SAYS}{{0,2}}([AB])",
    rf"I(?:'d| would)? (?:choose|prefer|pick|select|go with|vote for) {SAYS}?([AB])",
    # A wins; answer A is better; A is the better answer; answer A is clearly better than answer B
    rf"(?:the )?(?:{NOUN}[\s_]?)?([AB]) (?:wins|is {VERY}(?:better|best|preferable|preferred|"
    rf"superior|stronger|winner)(?: {NOUN}| one)?)(?: overall)?"
    rf"(?: (?:than|over|to) (?:the )?(?:{NOUN}[\s_]?)?([AB]))?")]
KEY = re.compile(rf"(?:{GOOD}[_ ]?)*(?:{NOUN}|{GOOD})", re.I)


class Unreadable(ValueError):
    """A reply that does not hold what was asked for."""


class Undecided(Unreadable):
    """An answer without a verdict: the judge has none, or refuses to say it."""


class CutOff(Unreadable):
    """An answer that the limit of its length has cut off."""


# ---------------------------------------------------------------- the answer of a reply
def answer_of(reply):
    """The text of a chat reply, without reasoning. Raises Unreadable, or what is more exact."""
    choice = first_choice(reply)
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    text, reason = message.get("content"), str(choice.get("finish_reason") or "").lower()
    if isinstance(text, list):      # parts, of which some are reasoning (Mistral)
        text = "".join(str(part.get("text") or "") for part in text
                       if isinstance(part, dict) and part.get("type") != "thinking")
    text = text if isinstance(text, str) else ""
    if reason in ("length", "max_tokens", "model_length", "model_context_window_exceeded"):
        raise CutOff(f"an answer that is cut off (finish_reason {reason})")
    if reason in ("content_filter", "safety", "refusal", "recitation", "prohibited_content"):
        raise Undecided(f"an answer that is refused (finish_reason {reason}): {text}")
    if not text.strip() and message.get("refusal"):
        raise Undecided(f"an answer that is refused: {message['refusal']}")
    *thoughts, answer = REASONING_END.split(text)
    for thought in reversed(thoughts):      # without its beginning, it is all that comes before
        begins = REASONING.search(thought)
        if not begins:
            break
        answer = thought[:begins.start()] + answer
    if REASONING.match(answer.strip()) or not answer.strip():
        thinks = text.strip() or message.get("reasoning") or message.get("reasoning_content")
        why = " but reasoning, for which ILR_JUDGE_MAX_TOKENS may be too low" if thinks else ""
        raise Unreadable(f"a reply without an answer{why}: {dumps(reply)[:300]}")
    return answer


# ---------------------------------------------------------------- its verdict
def verdict_of(text):
    """The letter that an answer ends in, "A" or "B", in any of the usual shapes; None if it does
    not, or may mean the other one as well."""
    text = unicodedata.normalize("NFKC", without_end(text[-5000:]))      # fullwidth letters
    if (letter := verdict_in_json(text)) is not None:
        return letter or None
    text = FORMAT_TAG.sub(" ", FENCE.sub("", TAGGED.sub(r" [[\2]] ", text)))
    lines = [line for line in VERDICT_TAG.sub("\n", text).split("\n") if re.search(r"\w", line)]
    found = [verdict_of_line(line) for line in lines[-2:]]
    # a list of both letters, or a change of mind, is no verdict
    return found[-1] if found and len({*found} - {None}) == 1 else None


def without_end(text):
    """A text without the tokens that end it, such as <|im_end|>."""
    while end := END.search(text := text.rstrip()):
        text = text[:end.start()]
    return text


def verdict_in_json(text):
    """The letter under the key of a verdict in the JSON object that ends a text; "" if that object
    has none; None without an object."""
    text = FENCE.sub("", text).strip()
    try:
        record = json.loads(text[text.rfind("{"):], strict=False)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    found = {verdict_of_line(str(v)) for k, v in record.items() if KEY.fullmatch(k)}
    return found.pop() or "" if len(found) == 1 else ""


def verdict_of_line(line):
    """The letter of a line that is a verdict, else None."""
    marks = [(m[1] or m[2], line[:m.start()]) for m in MARK.finditer(line)]
    if marks:
        letters = {None if UNLESS.search(before) else letter.upper() for letter, before in marks}
        return letters.pop() if len(letters) == 1 else None
    line = QUOTES.sub("", re.sub(r"\\(?:text\w*|math\w+)\b|\bvs\.", " ", line)).strip()
    if line.endswith("?"):
        return None
    sentences = [s for s in re.split("[.!?]+", line) if s.strip(" ,;-_")]
    found = [verdict_of_sentence(s) for s in sentences]
    return found[-1] if found and len({*found} - {None}) == 1 else None


def verdict_of_sentence(sentence):
    label, _, said = sentence.rpartition(":")
    said = " ".join(said.strip(" \t_-+•–—=→✅✔👉").split())
    for shape in SHAPES:
        if (match := shape.fullmatch(said)) and not NEGATIVE.search(label):
            letter, other = match[1], (match[2] if shape.groups > 1 else "") or ""
            # a lower-case letter in a sentence may be the article
            if letter.upper() != other.upper() and (letter.isupper() or said == letter):
                return letter.upper()
    return None


# ---------------------------------------------------------------- its probability
def probability_of_b(reply):
    """P(B) / (P(A) + P(B)) at the letter that ends a chat reply.

    Without log-probabilities of that letter in the reply, 1.0 for B and 0.0 for A. Raises
    Undecided for an answer without a verdict, Unreadable for a reply without an answer.
    """
    text = answer_of(reply)
    letter = verdict_of(text)
    if not letter:
        raise Undecided(f"a reply that does not end in A or B alone: {text.strip()}")
    found = {"A": 0.0, "B": 0.0}
    try:
        for t in token_of(letter, text, first_choice(reply)["logprobs"]["content"]):
            if letter_of(t["token"]):
                found[letter_of(t["token"])] += math.exp(min(0.0, float(t["logprob"])))
        if sum(found.values()) > 0:
            return found["B"] / (found["A"] + found["B"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        pass        # log-probabilities are optional, and not every server's have this form
    return float(letter == "B")


def token_of(letter, text, tokens):
    """The likely tokens, `top_logprobs`, in place of the letter that ends a text; [] if that
    letter is no token of its own."""
    def words(part):
        return re.sub(r"[\W_ĠĊ]", "", part)
    after = without_end(text).rpartition(letter)[2]
    if verdict_in_json(text) is not None or words(re.sub(r"</\w+>", "", after)):
        return []
    said = ""       # what follows the token
    for t in reversed(tokens):
        if letter_of(t["token"]) == letter and words(said) == words(after):
            return t["top_logprobs"]
        said = ("" if END.fullmatch(t["token"]) else t["token"]) + said
    return []


def letter_of(token):
    """The letter that a token is, A or B, without the blanks and signs around it; else None."""
    token = token.strip(" \t\n\r▁ĠĊ*_`\"'“”([{<#$>)]}.:!")
    return token if token in ("A", "B") else None
