"""The question that an endpoint judges by, and how its reply is read.

A reply holds a verdict if its last line says one of the two letters, with nothing around it but
what is listed below, and no line shortly before says the other one. All else is none, and so is
what the server has cut off: no verdict is better than a wrong one.
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
# What ends a text; how a server says that an answer is at its end; a fence around a block of code.
END = re.compile(r"(?i)(?:</?s>|<eo[st]>|<end_of_turn>|\[EOS\]|<[|｜][^<>|｜]{1,40}[|｜]>)$")
FINISHED = r"(?:none|(?:finish_reason_)?(?:stop(?:ped)?|eos|eot|end|completed?)(?:_\w+)?)?"
FENCE = re.compile(r"^\s*```[ \t]*(?:\w{2,})?[ \t]*\r?$", re.M)

# ---------------------------------------------------------------- shapes of a verdict
# All that may stand around a letter. What is not listed here ("Worse: A") makes it none.
NOUN = ("answer|response|reply|completion|option|candidate|choice|assistant|model|verdict|winner|"
        "decision|judge?ment|conclusion|preference|letter|result|selection|pick|vote")
GOOD = "final|overall|better|best|preferred|preferable|winning|chosen|correct|superior|stronger"
SAYS = ("so|thus|therefore|hence|in conclusion|in summary|sure|okay|here is|the|my|of|is|it is|"
        "it's|would be|goes to|I|I'd|I would|choose|prefer|select|go with|vote for|I think|"
        "I believe")
BEFORE = rf"(?:(?:{NOUN}|{GOOD}|{SAYS})[\s:;,._=–—-]+)*"
VERY = "(?:(?:the|a|my|clearly|slightly|much|far|overall) )*"
AFTER = rf"(?: wins| is {VERY}(?:{GOOD}|winner)(?: (?:{NOUN}))?)?(?: overall)?"
LETTER = rf"(?i:{BEFORE}(?:{NOUN})?)([AB])"
VERDICT = re.compile(rf"{LETTER}(?i:{AFTER})(?:(?: (?:than|over|to|beats) | ?>+ ?){LETTER})?")
LABELLED = re.compile(r": ?([AB])(?=$|,)")      # Style: A
# Tags around a verdict, <final_answer>, and its key in JSON; keys that say nothing against it.
KEY = rf"(?i:(?:(?:{GOOD})[_ ]?)*(?:{NOUN}|{GOOD}))"
WORSE = "(?i:worse|loser|rejected)"
ASIDE = r"(?i:(?:reason|explanation|analysis|rationale|justification|comparison|confidence)\w*)"
# \boxed{\text{A}}, <b>; then the signs around letters and words
MARKUP = re.compile(rf"</?{KEY}>|</?(?:b|i|u|p|em|strong|span|div|br|h[1-6]|li|ul|code|pre)\s*/?>|"
                    r"\\(?:f?box(?:ed)?|text\w*|math\w*)\b")
SIGNS = re.compile(r"\(A or B\)|[*`\"“”„«»$#|{}\[\]()【】「」‘\\]|(?<!\w)'|'(?!\w)|<(?=[AB]>)|"
                   r"(?<=<[AB])>")
# A sentence on the line of another one counts if it has words.
SENTENCE = re.compile(r"\n|(?<=\w\w[.!])[ \t](?=\W{0,6}[A-Za-z] ?\w)")


class Unreadable(ValueError):
    """A reply that does not hold what was asked for."""


class Undecided(Unreadable):
    """An answer without a verdict: the judge has none, or refuses to say it."""
    waits = False       # before it is asked again


class Empty(Undecided):
    """An answer that is finished and says nothing; the server may not be ready."""
    waits = True


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
        text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict)
                       and part.get("type", "text") in ("text", "output_text"))
    text = text if isinstance(text, str) else ""
    if re.search("length|(?<!rate_)limit|max_|incomplete|context", reason):
        raise CutOff(f"an answer that is cut off (finish_reason {reason})")
    if re.search("filter|safety|refus|recitation|prohibited|block|sensitive", reason):
        raise Undecided(f"an answer that is refused (finish_reason {reason}): {text}")
    if not re.fullmatch(FINISHED, reason):
        raise Unreadable(f"an answer that is not finished (finish_reason {reason})")
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
        # a server that says that it is done has answered; without that it has failed
        kind = Empty if reason not in ("", "none") else Unreadable
        raise kind(f"a reply without an answer{why}: {dumps(reply)[:300]}")
    return answer


# ---------------------------------------------------------------- its verdict
def verdict_of(text):
    """The letter that an answer ends in, "A" or "B", in any of the usual shapes; None if it does
    not, or may mean the other one as well."""
    text = unicodedata.normalize("NFKC", without_end(text[-5000:]))      # fullwidth letters
    text = MARKUP.sub(" ", json_as_letter(FENCE.sub("", text)))
    text = re.sub(r":[\s*_]*\n", ": ", text)        # a label on a line of its own
    lines = [line for line in SENTENCE.split(text) if re.search(r"[^\W_]", line)][-4:]
    if not lines:
        return None
    *before, letter = [verdict_of_line(line) for line in lines]
    # a list, or a change of mind, is no verdict
    labelled = [said for line in lines[:-1] for said in LABELLED.findall(plain(line))]
    return letter if {*before, *labelled, letter} <= {letter, None} else None


def without_end(text):
    """A text without the tokens that end it, such as <|im_end|>."""
    while end := END.search(text := text.rstrip()):
        text = text[:end.start()]
    return text


def json_as_letter(text):
    """A text with the verdict of the JSON object that ends it in the place of that object; "" if
    that has none; the same text without an object."""
    begins = text.rfind("{")
    try:
        pairs = json.loads(text[begins:], strict=False, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return text
    if not isinstance(pairs, list):
        return text
    said = [(key, verdict_of_line(str(value))) for key, value in pairs]
    letters = {letter for key, letter in said if re.fullmatch(KEY, key)}
    against = {letter for key, letter in said if re.fullmatch(WORSE, key)}
    good = (len(letters) == 1 and not letters & against
            and all(re.fullmatch(f"{KEY}|{WORSE}|{ASIDE}", key) for key, _ in said))
    return text[:begins] + (letters.pop() or "?") if good else ""


def plain(line):
    """A line without the signs around it and its words; a letter alone or behind a label is large
    in it."""
    line = " ".join(SIGNS.sub(" ", line.replace("’", "'")).split())
    line = re.sub("[=-]+>|→", ":", line).lstrip(" :_-+•–—=>✅✔👉").rstrip(" .!_")
    line = re.sub(r"^1[. ]+", "", line)     # a list's second item may be the second best
    return re.sub("(?:^|[:_] ?)[ab]$", lambda found: found[0].upper(), line)


def verdict_of_line(line):
    """The letter of a line that is a verdict and nothing else, else None."""
    match = VERDICT.fullmatch(plain(line))
    return match[1] if match and match[1] != match[2] else None


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
                found[letter_of(t["token"])] += math.exp(min(float(t["logprob"]), 0.0))
        # a list without the letter that was said, or with a NaN, would reverse the verdict
        if found[letter] > 0 and math.isfinite(sum(found.values())):
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
    text = FENCE.sub("", text)
    if json_as_letter(text) != text or words(re.sub(r"</\w+>", "", after)):
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
