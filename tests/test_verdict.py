"""core/verdict.py: what is a verdict, in all the shapes that models write it; what is none; and the
probability of its letter."""
import math

import pytest

from core.verdict import CutOff, Undecided, Unreadable, answer_of, probability_of_b, verdict_of

# X: the better letter; Y: the other one.
VERDICTS = [
    "X", "Okay. X", " X \r\n", "X.", "X!", "My choice is: X", "X\n---",
    "Y rambles. X is right.\n\nX",
    # signs around it
    "**X**", "__X__", "`X`", "'X'", '"X"', "\u201cX\u201d", "(X)", "[X]", "{X}", "<X>",
    "\u3010X\u3011", "| X |", "It is: **X**.", "Sure. `X`", "\u2192 X", "\u2705 X",
    # a heading, an item of a list, a quotation, a fence
    "## X", "# **X**", "- X", "* X", "\u2022 X", "1. X", "> X", "```\nX\n```", "```text\nX\n```\n",
    # marks within a line
    "[[X]]", "My final verdict is: [[X]].", "I choose [[X]]", r"$\boxed{X}$", r"\[\boxed{X}\]",
    r"The answer is $\boxed{\text{X}}$.", r"\boxed{\text{Answer X}}", r"\text{X}", r"$$\fbox{X}$$",
    r"\boxed{(X)}", r"\boxed{X.}", "[[X>Y]]", "[[X>>Y]]",
    # tags
    "<answer>X</answer>", "<answer>\nX\n</answer>", "Verdict: <verdict>X</verdict>",
    "<final_answer>X</final_answer>", "So <answer>X</answer>", "<b>X</b>",
    "<answer>\n**X**\n</answer>",
    # labels
    "Verdict: X", "**Verdict:** X", "**Verdict: X**", "Verdict\uff1aX", "Verdict - X",
    "Final answer: X.", "Final answer \u2192 X", "Winner: X", "Better answer: X", "Answer X",
    "answer_X", "Option X", "Response X", "**Answer X**", "Better answer (A or B): X",
    "The letter of the better answer: X", "The letter of the better answer is X.", "AnswerX",
    "Verdict => X", "_Verdict_: _X_", "| Verdict | X |", "Final verdict:\n\n**X**",
    # sentences
    "The better answer is X.", "The better answer is **X**.", "The better answer is answer X.",
    "So the better answer is X", "I choose X.", "I would choose answer X.", "X is better.",
    "Answer X is better.", "X is better than Y.", "X wins.", "Both are fair. Answer X is better.",
    "Answer X is the better answer.", "**Answer X** is clearly better than Answer Y.",
    "Therefore, answer X is better.", "X vs. Y is close.\n\nX",
    "Choose X", "I\u2019d choose X", "X > Y", "X over Y", "X beats Y", "I prefer X to [[Y]].",
    "X is preferred over Y", "Y is terse. X wins.", "Y is terse. It is clear. The answer is X.",
    # other lines that speak of both
    "Y: short.\nX: long.\n\nX", "Style: X\nFinal answer: X", "**Y:**\n- short\n**X:**\n- long\n\nX",
    # JSON
    '{"better": "X"}', '```json\n{"better": "X"}\n```', '{"reason": "Y is vague.", "better": "X"}',
    '{\n "verdict": "Answer X"\n}', "{'better': 'X'}", '{"better": "X", "worse": "Y"}',
    '{"winner": "answer_x"}', '{"better": "X", "confidence": 0.9}', 'Verdict: {"answer": "X"}',
    # the end of the text
    "X</s>", "X [EOS]", "```X```", "X<|im_end|>", "X<|eot_id|>\n",
    "X<\uff5cend\u2581of\u2581sentence\uff5c>",
    # reasoning is no part of it
    "<think>Y is fine. Y</think>\nX", "Y?\n</think>\n\nX", "[THINK]Y[/THINK]X", "X<think>Y</think>",
    "<think>Y</think><answer>X</answer>", "Answer Y has a <think> in it.\nX",
    "\u25c1think\u25b7Y\u25c1/think\u25b7X",
    "<|channel|>analysis<|message|>Y<|end|><|start|>assistant<|channel|>final<|message|>X<|return|>"]
# Letters that are not in the table's alphabet: A in full width, in a circle, in lower case.
OF_A = ["\uff21", "\uff08\uff21\uff09", "\u24b6", "a", "(a)", "Verdict: a", '{"better": "a"}']
NONE = [
    "", "C", "AB", "BANANA", "Ab", "tie", "neither", "both", "Equal", "Verdict: tie", "Answer C",
    # both letters
    "A or B", "A or B?", "A and B", "both A and B", "Neither A nor B", "A/B", "A, B", "A|B",
    "A & B", "A+B", "A vs B", "I prefer A vs. B", "A < B", "[[A=B]]", "A >= B", "A. B",
    "Verdict: A\nB", "A\nB",
    "- A\n- B", "1. A\n2. B", "A: 7, B: 8", "- A: 7\n- B: 9", "First: A, second: B",
    "Best: A; second: B", "Better: A. Worse: B", "Answer A is better. Answer B is better.",
    r"\boxed{A} and \boxed{B}",
    "[[A]] or [[B]]", "<answer>A</answer> or <answer>B</answer>", r"\boxed{A or B}",
    '{"A": 1, "B": 2}', '{"first": "A", "second": "B"}', '{"better": "A or B"}',
    # a letter that is denied, doubted or worse
    "I cannot say A", "Not A", "not [[A]]", "It isn't A", "I don't think it is A", "A?",
    "A is not better than B", "A is worse", "A is as good as B", "A is better than A",
    "Worse: A", "The worse answer: A", "Rejected: A", "Not the better one: A", "Both are equal: A",
    "Verdict: neither", "Cannot decide: A", "I would not choose A", "either A", "A but B",
    "It is a tie: a", '{"worse": "A"}', "<worse_answer>A</worse_answer>", '{"better": null}',
    "If you want brevity, A is better, otherwise B",
    # nothing stands around a letter or a mark but what is listed
    "Worse: [[A]]", r"The worse answer is \boxed{A}.", "[[A]] is worse", "[[A]] is not better",
    "I reject [[A]]", r"\boxed{A} is wrong", "B beats not [[A]]", "[[A]] is beaten by B",
    "Instead of [[A]]: B", "The answer to reject is <answer>A</answer>", "I cannot choose. [[A]]",
    r"I cannot choose. \boxed{A}", "I cannot choose. <verdict>A</verdict>", "It is a tie, so [[A]]",
    "Is it [[A]]?", "Is it A", "Incorrect: A", "Incorrect answer: A", "Fail: A", "Weakest: A",
    "Lower quality: A", "Least helpful: A", "Contains errors: A", "Dispreferred: A", "Last: A",
    "Rank 2: A", "2nd place: A", "2. A", "Opposite: A", "Instead of B: A", "Better than: A",
    "Preferred to A", "Answer A: B", "Answer: !A", "~~A~~", "<s>A</s>", "<del>A</del>", "N.A.",
    "Verdict: n.a.", "A \u274c", "\u2260 A", "The worse answer is:\nA", "**Worse:**\n\nA",
    'The worse answer is {"answer": "A"}', '{"choice": "B", "correct": false}',
    '{"better": "A", "worse": "A"}', '{"answer": "A", "answer": "B"}',
    # another line near the end says the other letter, or of what else
    "Final answer: B\n\nStyle: A\nLength: A", "Style: A\nLength: A\nFinal answer: B",
    "Verdict: A\nNo, wait.\nVerdict: B", '{"answer": "A"}\n{"answer": "B"}',
    '{"answer": "A", "score": 9}\n{"answer": "B", "score": 3}',
    # a letter that is none, or not the end
    "A\nis what I say", "the better one is A", "A better answer would be", "A better answer",
    "A clear winner", "A correct answer is B", "The answer is a", "Vitamin A", "Plan B",
    "</answer_A>", "B:", "<think>A", "<think>A\n<think>B</think>"]


def read(text):
    """The verdict of a reply with this text, None without one."""
    try:
        return verdict_of(answer_of({"choices": [{"message": {"content": text}}]}))
    except Unreadable:
        return None


@pytest.mark.parametrize("text", VERDICTS)
def test_a_verdict_is_read_in_every_usual_shape(text):
    for better, other in ("AB", "BA"):
        assert read(text.replace("X", better).replace("Y", other).replace(
            "_x", f"_{better.lower()}")) == better


@pytest.mark.parametrize("text", OF_A)
def test_a_verdict_is_read_in_other_letters(text):
    assert read(text) == "A"


@pytest.mark.parametrize("text", NONE)
def test_what_is_ambiguous_is_no_verdict(text):
    assert read(text) is None


def test_long_texts_are_read_in_no_time():
    """Patterns that try every place again would take hours."""
    for text in ("\n" * 10**6 + "`" * 10**6 + "x", "<think>" * 10**5, "A" * 10**6, "<" * 10**6,
                 "{" * 10**6 + "}", "overall " * 10**5 + "x", "ab." + " " * 10**5 + "x",
                 "{" + "[" * 4990, "it is " * 10**5, "A" + ">" * 10**5 + "x", ":\n" * 10**5,
                 "[[" * 10**5, "the " * 10**5 + "A", "</s>" * 10**5):
        read(text)


# ---------------------------------------------------------------- what an answer is
def test_reasoning_beside_the_answer_is_no_answer():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "B"}]},
             {"type": "reasoning", "text": "so maybe\nB\n"}, {"type": "text", "text": "So\n"},
             {"type": "text", "text": "A"}]
    for message in ({"content": "A", "reasoning_content": "B\nB"}, {"content": parts},
                    {"content": "A", "reasoning": "B", "refusal": None}):
        assert probability_of_b({"choices": [{"message": message}]}) == 0
    with pytest.raises(Unreadable):
        answer_of({"choices": [{"message": {"content": parts[:2]}}]})
    with pytest.raises(Unreadable, match="without an answer but reasoning") as e:
        answer_of({"choices": [{"message": {"content": None, "reasoning_content": "so\nA"}}]})
    assert type(e.value) is Unreadable      # no answer at all: it never counts as undecided


def test_what_ends_an_answer_is_told_apart():
    def said(text, reason, **message):
        return {"choices": [{"message": {"content": text, **message}, "finish_reason": reason}]}
    for reason in ("length", "max_tokens", "MAX_TOKENS", "max_output_tokens", "token_limit",
                   "incomplete", "model_context_window_exceeded"):
        with pytest.raises(CutOff, match=f"cut off .finish_reason {reason.lower()}"):
            probability_of_b(said("So\nA", reason))
    for reply in (said("A", "content_filter"), said("", "SAFETY"), said(None, "stop", refusal="No"),
                  said("I am unable to help.", "stop")):
        with pytest.raises(Undecided):
            probability_of_b(reply)
    for reason in ("stop", None, "STOP", "eos", "eos_token", "end_turn", "stop_sequence",
                   "COMPLETE"):
        assert probability_of_b(said("A", reason)) == 0
    for reason in ("other", "tool_calls", "FINISH_REASON_UNSPECIFIED"):     # not known as an end
        with pytest.raises(Unreadable, match="not finished") as e:
            probability_of_b(said("A", reason))
        assert type(e.value) is Unreadable


# ---------------------------------------------------------------- log-probabilities
def with_tokens(text, tokens, likely):
    """A reply whose token `likely` has A at -0.1 and B at -2.3, each as that token is written."""
    def alternatives(token):
        letter = next((c for c in token if c in "AB"), None)
        return [{"token": token.replace(letter, c), "logprob": p}
                for c, p in (("A", -0.1), ("B", -2.3))] if letter else []
    content = [{"token": t, "logprob": -0.1,
                "top_logprobs": alternatives(t) if i == likely else
                [{"token": "B", "logprob": 0.0}]} for i, t in enumerate(tokens)]
    return {"choices": [{"message": {"content": text}, "logprobs": {"content": content}}]}


AT_THE_LETTER = 1 / (1 + math.exp(2.3 - 0.1))


@pytest.mark.parametrize("text, tokens, likely", [
    ("A", ["A"], 0), ("A is ok.\nA", ["A", " is", " ok", ".\n", "A"], 4),
    ("So: A.", ["So", ":", " A", "."], 2), ("**A**", ["**", "A", "**"], 1),
    ("**A**", ["**A", "**"], 0), ("So: A", ["So", ":", "\u0120A"], 2),
    ("It is: A", ["\u2581It", "\u2581is", ":", "\u2581A"], 3), ("[[A]]", ["[[", "A", "]]"], 1),
    (r"\boxed{A}", ["\\", "boxed", "{A", "}"], 2), ("(A)", ["(A", ")"], 0),
    ("A", ["A", "<|im_end|>"], 0), ("Answer A", ["Answer", " A"], 1),
    ("<answer>A</answer>", ["<answer>", "A", "</", "answer", ">"], 1),
    ("<think>B</think>A", ["<think>", "B", "</think>", "A"], 3)])
def test_probabilities_are_taken_at_the_letter_of_the_verdict(text, tokens, likely):
    # float64 arithmetic
    assert probability_of_b(with_tokens(text, tokens, likely)) == pytest.approx(AT_THE_LETTER,
                                                                               abs=1e-12)


@pytest.mark.parametrize("text, tokens", [
    ("A is ok.\nAnswerA", ["A", " is", " ok", ".\n", "AnswerA"]),     # no token of its own
    ("A is better than B", ["A", " is", " better", " than", " B"]),
    ('{"better": "A", "reason": "so says A"}', ['{"better', '": "', "A", '", "reason": "so says',
                                                " A", '"}']),
    ("a", ["a"]), ("A", ["So", " B"]), ("A", []), ("A", ["A", " then"])])
def test_a_letter_that_is_no_token_of_its_own_counts_as_certain(text, tokens):
    assert probability_of_b(with_tokens(text, tokens, None)) == 0


@pytest.mark.parametrize("likely", [{"A": -0.1}, {"A": -0.1, "B": -9999.0}, {"B": math.nan},
                                    {"A": math.nan, "B": -1}, {"A": math.inf, "B": -math.inf}, {}])
def test_log_probabilities_without_the_letter_that_is_said_reverse_nothing(likely):
    top = [{"token": t, "logprob": p} for t, p in likely.items()]
    assert probability_of_b({"choices": [{"message": {"content": "B"}, "logprobs": {
        "content": [{"token": "B", "logprob": -0.1, "top_logprobs": top}]}}]}) == 1
