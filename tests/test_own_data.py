"""A user's own data, as Hugging Face TRL has it: what is read, what is refused, what is trained."""
import contextlib
import datetime
import http.server
import importlib
import json
import os
import re
import shlex
import threading
from pathlib import Path
from string import Template
from types import SimpleNamespace

import pytest
from conftest import ROOT, everything, preferences, rows, run

import baselines
import compare
import dpo
import evaluate
import generate
import refine
import sft
from baselines import label_noise
from core import tokens, unfinished
from core.cli import run_stage
from core.records import InputError, read_json, read_jsonl, write_jsonl
from core.tokens import (
    encode_completion,
    encode_prompt,
    encode_record,
    open_tokenizer,
    question_of,
)
from core.unfinished import claim, partial_path

# A template in the shipped tokenizer's own letters. BOS stands before a content, as the special
# tokens and line breaks of other templates do, so that no token spans the border.
TEMPLATE = ("{% for m in messages %}{{ m.role[0] }}{{ bos_token }}{{ m.content }}{{ eos_token }}\n"
            "{% endfor %}{% if add_generation_prompt %}a{{ bos_token }}{% endif %}")
SYSTEM, SKY = {"role": "system", "content": "be brief"}, {"role": "user", "content": "2+3?"}
BLUE, GREEN = ({"role": "assistant", "content": text} for text in ("2+3=5\n#### 5", "#### 4"))
MORE, LAST = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "#### 2"}


@pytest.fixture(scope="module")
def chat(tiny, tmp_path_factory):
    """The tiny model with a chat template."""
    return with_template(tiny, tmp_path_factory.mktemp("chat") / "model", TEMPLATE)


def with_template(tiny, folder, template):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(tiny / "model").save_pretrained(folder)
    return folder


def written(path, *records, newline="\n", bom=b""):
    path.write_bytes(bom + "".join(json.dumps(r) + newline for r in records).encode())
    return path


def one(path, record, *fields):
    """What stages see of a file with one record."""
    return dict(read_jsonl(written(path, record), fields)[0])


DEMO, PAIR = ("id", "prompt", "completion"), ("id", "prompt", "chosen", "rejected")


# ---------------------------------------------------------------- what is read
def test_every_format_of_trl_is_read_as_it_is(tmp_path):
    d, question = tmp_path / "d.jsonl", [SYSTEM, SKY]
    text = {"prompt": "The sky is", "completion": " blue."}
    assert one(d, text, *DEMO) == {"id": 1, **text}
    assert one(d, {"prompt": "The sky is"}, "id", "prompt") == {"id": 1, "prompt": "The sky is"}
    assert one(d, {"prompt": question, "completion": [BLUE]}, *DEMO) == {
        "id": 1, "prompt": question, "completion": BLUE["content"]}
    assert one(d, {"prompt": question}, "id", "prompt")["prompt"] == question
    found = one(d, {"messages": [*question, BLUE, MORE, LAST]}, *DEMO)
    assert found["prompt"] == [*question, BLUE, MORE] and found["completion"] == "#### 2"
    pair = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert one(d, pair, *PAIR) == {"id": 1, **pair}
    assert one(d, {"chosen": "The sky is blue.", "rejected": "The sky is black."}, *PAIR) == {
        "id": 1, "prompt": "The sky is", "chosen": " blue.", "rejected": " black."}
    sides = {"chosen": BLUE["content"], "rejected": GREEN["content"]}
    explicit = {"prompt": question, "chosen": [BLUE], "rejected": [GREEN]}
    implicit = {"chosen": [*question, BLUE], "rejected": [*question, GREEN]}
    for record in (explicit, implicit, {**implicit, "prompt": "2+3?"}):
        assert one(d, record, *PAIR) == {"id": 1, "prompt": question, **sides}


def test_variants_that_data_on_the_hub_has(tmp_path):
    """Parts of type text, nulls, ShareGPT's names, a prompt that repeats the first message, empty
    columns of tables of several forms, flags that say what is done anyway."""
    d, expected = tmp_path / "d.jsonl", {"prompt": [SKY], "completion": "#### 4"}
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "3?"}]
    turns = [{"role": "user", "content": parts, "tool_calls": None}, {**GREEN, "name": None}]
    for record in ({"messages": turns}, {"messages": turns, "prompt": "2+3?", "tools": []},
                   {"messages": None, "prompt": turns[:1], "completion": turns[1:]},
                   {"conversations": [{"from": "human", "value": "2+3?"},
                                      {"from": "gpt", "value": "#### 4"}]},
                   {"prompt": turns[:1], "completion": turns[1:]},
                   {"messages": turns, "prompt": None, "completion": None, "conversations": []},
                   {"messages": turns, "prompt": "", "completion": ""},
                   {"messages": [], "prompt": turns[:1], "completion": turns[1:], "tools": []},
                   {"messages": None, "conversations": turns},
                   {"conversations": turns, "messages": None, "chosen": None, "system": ""},
                   {"prompt": turns[:1], "completion": turns[1:], "tools": "[]", "system": None},
                   {"messages": [turns[0], {**GREEN, "weight": 1, "train": True, "mask": False}]},
                   {"messages": [{**SKY, "weight": 0, "train": False}, GREEN], "images": None},
                   {"messages": [SKY, {**GREEN, "turn": 1, "score": 0.5, "lang": "en"}]}):
        found = one(d, record, *DEMO)
        found["prompt"] = [{k: m[k] for k in ("role", "content")} for m in found["prompt"]]
        assert {k: found[k] for k in expected} == expected


def test_what_belongs_to_a_prompt_matters_where_the_prompt_is_read(tmp_path):
    """Answers to images or under a system prompt may be graded, which reads neither."""
    data = written(tmp_path / "d.jsonl", {"prompt": "q", "completion": "#### 5", "reference": 5,
                                          "images": ["x.png"], "system": "be brief"})
    run(evaluate, "grade", "--task", "arithmetic", "--data", data, "--out", tmp_path / "g.jsonl")
    assert rows(tmp_path / "g.jsonl")[0]["correct"] == 1


def test_sharegpt_preferences(tmp_path):
    """As LLaMA-Factory has them; other keys of a message stay."""
    human, chosen, rejected = ({"from": role, "value": text} for role, text in (
        ("human", "2+3?"), ("gpt", BLUE["content"]), ("gpt", GREEN["content"])))
    found = one(tmp_path / "d.jsonl", {"conversations": [{**human, "name": "x"}], "chosen": chosen,
                                       "rejected": rejected}, *PAIR)
    assert {k: found[k] for k in ("prompt", "chosen", "rejected")} == {
        "prompt": [{**SKY, "name": "x"}], "chosen": BLUE["content"], "rejected": GREEN["content"]}


@pytest.mark.parametrize("newline, bom", [("\n", b"\xef\xbb\xbf"), ("\r\n", b""),
                                          ("\r\n", b"\xef\xbb\xbf"), ("\n\n", b"")])
def test_byte_order_marks_and_line_ends_of_other_systems(tmp_path, newline, bom):
    records = [{"prompt": f"{i}\u2028?", "completion": "\r\n"} for i in range(3)]
    found = read_jsonl(written(tmp_path / "d.jsonl", *records, newline=newline, bom=bom), DEMO)
    step = len(newline.strip("\r"))
    assert found == [{"id": 1 + step * i, **r} for i, r in enumerate(records)]
    (tmp_path / "x.json").write_bytes(bom + b'{"a": 1}' + newline.encode())
    assert read_json(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize("number, text", [
    ("42", "42"), ("42.0", "42"), ("-3", "-3"), ("1e3", "1000"), ("0.5", "0.5"), ("-0.0", "0"),
    ("65960", "65960"), ('"65,960"', "65,960"), ("12345678901234567890", "12345678901234567890")])
def test_a_reference_may_be_a_number(tmp_path, number, text):
    (tmp_path / "d.jsonl").write_text(f'{{"id": 1, "reference": {number}}}\n')
    assert read_jsonl(tmp_path / "d.jsonl", ("id", "reference"))[0]["reference"] == text


@pytest.mark.parametrize("value", ["true", "[42]", '{"value": 42}', "1e999"])
def test_a_reference_that_is_neither_text_nor_number(tmp_path, value):
    """It is refused where it is needed, and kept elsewhere."""
    (tmp_path / "d.jsonl").write_text(f'\n{{"id": 1, "reference": {value}}}\n')
    with pytest.raises(InputError, match="d.jsonl:2: field 'reference' must be a string or a num"):
        read_jsonl(tmp_path / "d.jsonl", ("id", "reference"))
    assert read_jsonl(tmp_path / "d.jsonl") == [{"id": 1, "reference": json.loads(value)}]


def test_nulls_are_no_ids_and_no_references(tmp_path):
    d = written(tmp_path / "d.jsonl", {"id": None, "reference": None}, {"id": None})
    assert read_jsonl(d) == [{"id": 1}, {"id": 2}]
    with pytest.raises(InputError, match="d.jsonl:1: field 'reference' is missing"):
        read_jsonl(d, ("id", "reference"))
    with pytest.raises(InputError, match="d.jsonl:2: has no id, unlike .*d.jsonl:1"):
        read_jsonl(written(d, {"id": "a"}, {"id": None}))


def test_refining_labels_whose_references_no_task_can_grade(tmp_path):
    """They are carried along; the summary grades nothing."""
    labels = [{"prompt": f"{i}", "completion": f"#### {i}", "reference": [i]} for i in range(8)]
    a = written(tmp_path / "a.jsonl", *labels)
    b = written(tmp_path / "b.jsonl", *({**r, "completion": "#### 9"} for r in labels))
    run(refine, "--method", "naive", "--task", "arithmetic", "--labels", a, "--proposals", b,
        "--max-replace", 0.5, "--out", tmp_path / "o.jsonl")
    assert [r["reference"] for r in rows(tmp_path / "o.jsonl")] == [[i] for i in range(8)]
    assert "precision" not in read_json(tmp_path / "o.jsonl.summary")


def test_lines_are_ids_in_what_stages_write(tiny, problems, tmp_path):
    records = [{"prompt": p["prompt"], "more": 1} for p in problems[:3]]
    data = written(tmp_path / "d.jsonl", *records)
    run(generate, "--model", tiny / "model", "--data", data, "--max-new-tokens", 2,
        "--out", tmp_path / "o.jsonl")
    found = rows(tmp_path / "o.jsonl")
    assert [r["id"] for r in found] == [1, 2, 3] and list(found[0])[:3] == ["id", "prompt", "more"]


def test_what_is_written_is_what_trl_reads(tmp_path):
    """The answer to a conversation is written as messages, and read again as it was."""
    whole = {"id": "a", "messages": [SYSTEM, SKY, BLUE]}
    split = {"id": "a", "prompt": [SYSTEM, SKY], "completion": [BLUE], "source": "x"}
    pair = {"id": "a", "prompt": [SKY], "chosen": [BLUE], "rejected": [GREEN]}
    for record, fields in ((whole, DEMO), (split, DEMO), (pair, PAIR)):
        found = read_jsonl(written(tmp_path / "a.jsonl", record), fields)
        write_jsonl(tmp_path / "b.jsonl", found)
        assert rows(tmp_path / "b.jsonl") == [record]
    found = read_jsonl(written(tmp_path / "a.jsonl", whole), DEMO)
    write_jsonl(tmp_path / "b.jsonl", [{**r, "completion": "no"} for r in found])
    no = {"role": "assistant", "content": "no"}
    assert rows(tmp_path / "b.jsonl") == [{"id": "a", "messages": [SYSTEM, SKY, no]}]


# ---------------------------------------------------------------- what is refused
CALL = {"role": "assistant", "tool_calls": [{"type": "function"}]}
HUMAN, GPT = {"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "#### 5"}
IMAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
REFUSED = [
    ("sft", {"messages": []}, "`messages` is an empty conversation"),
    ("sft", {"messages": "hello"}, "`messages` must be a list of messages"),
    ("sft", {"messages": [SKY]}, "the last of `messages` is the user's: end with the assistant's"),
    ("sft", {"messages": [GREEN]}, "an assistant's message in `messages` follows no user's"),
    ("sft", {"messages": [SKY, GREEN, BLUE]}, "follows no user's"),
    ("sft", {"messages": [SKY, CALL]}, "`tool_calls` is not taken"),
    ("sft", {"messages": [SKY, {"role": "tool", "content": "5"}, BLUE]}, "holds tool calls"),
    ("sft", {"messages": [SKY, BLUE], "tools": [{}]}, "`tools` is not taken"),
    ("sft", {"messages": [IMAGE, BLUE]}, "a content in `messages` is not text alone"),
    ("sft", {"messages": [SKY, BLUE], "images": ["x.png"]}, "`images` is not taken"),
    ("sft", {"messages": [SKY, {"role": "assistant"}]}, "has no content"),
    ("sft", {"messages": [SKY, {"content": "5"}]}, "must be a list of messages"),
    ("sft", {"messages": [SKY, {**BLUE, "reasoning_content": "hm"}]}, "`reasoning_content` of an"),
    *(("sft", {"messages": [SKY, {**BLUE, key: value}]}, f"`{key}` of an answer in `mess")
      for key, value in (("weight", 0), ("weight", 0.5), ("train", False), ("loss", False),
                         ("is_trainable", False), ("loss_mask", 0), ("mask", 1), ("masked", True),
                         ("ignore", True), ("train_detail", [{"begin_offset": 0}]))),
    ("sft", {"conversations": [HUMAN, {**GPT, "weight": 0}]}, "`weight` of an answer"),
    ("sft", {"conversations": [HUMAN, {**GPT, "loss": False}]}, "`loss` of an answer"),
    ("sft", {"conversations": [HUMAN, {**GPT, "reasoning": "hm"}]}, "`reasoning` of an answer"),
    ("sft", {"conversations": [HUMAN, {**GPT, "tool_calls": [{}]}]}, "`tool_calls` is not taken"),
    ("sft", {"conversations": [{**HUMAN, "images": ["x"]}, GPT]}, "`images` is not taken"),
    ("sft", {"messages": [SKY, BLUE], "conversations": [HUMAN, GPT]}, "has `messages` and `conver"),
    ("sft", {"prompt": "q", "completion": "a", "images": ["x.png"]}, "`images` is not taken"),
    ("sft", {"prompt": "q", "completion": "a", "tools": ["a"]}, "`tools` is not taken"),
    ("generate", {"prompt": "q", "image": "x.png"}, "`image` is not taken"),
    ("dpo", {"prompt": "q", "chosen": "a", "rejected": "b", "images": ["x"]}, "`images` is not"),
    *((name, {**record, "system": "be brief"}, "`system` is not read: write it as the first")
      for name, record in (("sft", {"messages": [SKY, BLUE]}), ("generate", {"prompt": [SKY]}),
                           ("sft", {"conversations": [HUMAN, GPT]}),
                           ("sft", {"prompt": "q", "completion": "a"}),
                           ("dpo", {"prompt": "q", "chosen": "a", "rejected": "b"}))),
    ("sft", {"messages": [SKY, BLUE], "completion": "5"}, "has `messages` and `completion`"),
    ("sft", {"prompt": "2+3?", "completion": [BLUE]}, "`completion` is a conversation and"),
    ("sft", {"prompt": [SKY], "completion": "5"}, "`prompt` is a conversation and `completion`"),
    ("sft", {"prompt": [SKY], "completion": [BLUE, MORE, LAST]}, "`completion` must be one"),
    ("sft", {"prompt": [SKY, GREEN], "completion": [BLUE]}, "the last message of `prompt` is the"),
    *(("sft", {"prompt": "2+3?", "completion": "5", "label": label}, "has a `label`, as unpaired")
      for label in (False, True, 0, 1, "True", "bad")),
    ("sft", {"text": "The sky is blue."}, "language modelling: write the text as `completion`"),
    ("sft", {"prompt": "q", "completions": ["a"], "labels": [True]}, "stepwise supervision"),
    ("sft", {"prompt": "q", "chosen": "a", "rejected": "b"}, "which dpo.py trains on"),
    ("sft", {"prompt": "q", "completion": "a", "truncated": "no"}, "'truncated' must be true or"),
    ("generate", {"prompt": [SKY, BLUE]}, "the last message of `prompt` is the assistant's"),
    ("generate", {"prompt": []}, "`prompt` is an empty conversation"),
    ("generate", {"prompt": ["hello"]}, "`prompt` must be a list of messages"),
    ("generate", {"prompt": 5}, "field 'prompt' must be a string"),
    ("dpo", {"chosen": [BLUE], "rejected": [GREEN]}, "must have all messages but the last in"),
    ("dpo", {"chosen": [SKY, BLUE, MORE, LAST], "rejected": [SKY, GREEN, MORE, LAST]}, "in common"),
    ("dpo", {"prompt": [SKY], "chosen": [SKY, BLUE], "rejected": [SKY, GREEN]}, "must be one mess"),
    ("dpo", {"prompt": [SKY], "chosen": "5", "rejected": "4"}, "`prompt` is a conversation and"),
    ("dpo", {"prompt": [SKY], "chosen": [BLUE], "rejected": "4"}, "`rejected` is not: write both"),
    ("dpo", {"question": "2+2?", "chosen": "4", "rejected": "5"}, "`question` is not read: give"),
    ("dpo", {"question": "q", "chosen": "It is 4", "rejected": "It is 5"}, "`question` is not"),
    ("dpo", {"chosen": "4", "rejected": "5"}, "have no beginning in common: give the question as"),
    ("dpo", {"prompt": "q", "chosen": GPT, "rejected": GPT}, "give it as `prompt`, a list of mess"),
    ("dpo", {"chosen": GPT, "rejected": GPT}, "the user's question at least: give it as `prompt`"),
    ("dpo", {"chosen": 4, "rejected": 5}, ":1: field 'prompt' is missing\n"),
    ("dpo", {"chosen": "4", "rejected": 5}, ":1: field 'prompt' is missing\n"),
    ("dpo", {"prompt": "q", "chosen": "a", "rejected": "b", "truncated": True}, "does not say"),
    *(("dpo", {"prompt": "q", "chosen": "a", "rejected": "b", f"{side}_truncated": value},
       f"field '{side}_truncated' must be true or false")
      for side in ("chosen", "rejected") for value in ("false", 1)),
    ("dpo", {"prompt": "q", "completion": "5"}, "demonstrations, which sft.py trains on"),
    ("dpo", {"messages": [SKY, BLUE]}, "demonstrations, which sft.py trains on")]
STAGES = {"sft": sft, "generate": generate, "dpo": dpo}


@pytest.mark.parametrize("name, record, message", REFUSED)
def test_what_cannot_be_taken_is_refused_with_its_line(name, record, message, chat, tmp_path,
                                                        capsys):
    lines = written(tmp_path / "d.jsonl", record)
    argv = ["--model", chat, "--data", lines, "--out", tmp_path / "new/out", "--chat-template"]
    with pytest.raises(SystemExit) as ended:
        run_stage(STAGES[name].parser(), STAGES[name].main, [str(a) for a in argv])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1, said
    assert f"{lines}:1: " in said and message in said
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["d.jsonl"]


def test_records_of_two_forms_are_refused(tmp_path):
    text, turns = {"prompt": "q", "completion": "a"}, {"prompt": [SKY], "completion": [BLUE]}
    for records, message in ((({"id": 1, **text}, text), "d.jsonl:2: has no id, unlike .*:1"),
                             ((text, {"id": 9, **text}), "d.jsonl:2: has id, unlike .*:1: give"),
                             ((text, turns), "d.jsonl:2: has messages, unlike .*d.jsonl:1: give"),
                             ((turns, text), "d.jsonl:2: has no messages, unlike")):
        with pytest.raises(InputError, match=message):
            read_jsonl(written(tmp_path / "d.jsonl", *records), DEMO)


@pytest.mark.parametrize("name, record", [
    ("sft", {"messages": [SKY, BLUE]}), ("generate", {"prompt": [SKY]}),
    ("dpo", {"chosen": [SKY, BLUE], "rejected": [SKY, GREEN]})])
def test_messages_without_a_template(name, record, tiny, tmp_path):
    data = written(tmp_path / "d.jsonl", record)
    with pytest.raises(InputError, match="d.jsonl:1: messages need --chat-template"):
        run(STAGES[name], "--model", tiny / "model", "--data", data, "--out", tmp_path / "o")


def test_a_template_that_refuses_a_conversation(tiny, tmp_path):
    """As Gemma's refuses system messages, and Mistral's two of the user's in a row."""
    picky = TEMPLATE.replace("{{ m.role[0] }}", "{% if m.role == 'system' %}{{ raise_exception("
                             "'System role not supported') }}{% endif %}{{ m.role[0] }}")
    folder = with_template(tiny, tmp_path / "m", picky)
    turns = [SKY, BLUE], [SYSTEM, SKY, BLUE]
    data = written(tmp_path / "d.jsonl", *({"messages": t} for t in turns))
    with pytest.raises(InputError, match="d.jsonl:2: .* refuses .*System role not supported"):
        run(sft, "--model", folder, "--data", data, "--chat-template", "--out", tmp_path / "o")


@pytest.mark.parametrize("code, why", [
    ("messages[0]['content'] + 1", "TypeError: "), ("1 // 0", "ZeroDivisionError: "),
    ("messages[7].content", "UndefinedError: "),
    ("messages[0].content.index('zz')", "ValueError: ")])
@pytest.mark.parametrize("when", ["always", "of a system message"])
def test_a_template_that_fails_in_its_own_way(code, why, when, tiny, tmp_path):
    failing = f"{{{{ {code} }}}}"
    if when != "always":
        failing = f"{{% if messages[0].role == 'system' %}}{failing}{{% endif %}}"
    folder = with_template(tiny, tmp_path / "m", failing + TEMPLATE)
    data = written(tmp_path / "d.jsonl", {"messages": [SYSTEM, SKY, BLUE]})
    place = f"--chat-template: that of {folder} " if when == "always" else f"{data}:1: .* template "
    for stage in (sft, generate):
        with pytest.raises(InputError, match=f"{place}refuses .*{why}") as e:
            run(stage, "--model", folder, "--data", data, "--chat-template", "--out",
                tmp_path / "o")
        assert "\n" not in str(e.value)


# ---------------------------------------------------------------- what is trained
def test_every_answer_of_a_conversation_is_trained_as_it_would_be_generated(chat, tmp_path):
    tokenizer = open_tokenizer(chat, chat_template=True)
    turns = [SYSTEM, SKY, BLUE, MORE, LAST]
    data = written(tmp_path / "d.jsonl", {"messages": turns})
    (ids, weights), = encode_record(tokenizer, read_jsonl(data, DEMO)[0], 0.25)
    assert ids == tokenizer.apply_chat_template(turns, return_dict=False)[:len(ids)]
    trained = [i for i, w in zip(ids, weights, strict=True) if w == 1]
    answers = [encode_completion(tokenizer, turn["content"]) for turn in (BLUE, LAST)]
    assert trained == answers[0] + answers[1] and set(weights) == {0.25, 1.0}
    for k, answer in ((2, answers[0]), (4, answers[1])):        # generation's prompt comes first
        prompt = encode_prompt(tokenizer, turns[:k])
        assert ids[:len(prompt) + len(answer)] == prompt + answer
    split = {"prompt": turns[:4], "completion": turns[4:]}
    (same, only), = encode_record(tokenizer, read_jsonl(written(data, split), DEMO)[0])
    assert same == ids and [i for i, w in zip(ids, only, strict=True) if w] == answers[1]


def test_a_template_that_writes_earlier_answers_otherwise(tiny, tmp_path, capsys):
    """As reasoning models' leave out earlier thoughts: then an answer is a sequence of its own."""
    folder = with_template(tiny, tmp_path / "m", TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content.split('####')[-1] }}"))
    tokenizer = open_tokenizer(folder, chat_template=True)
    turns = [SKY, BLUE, MORE, LAST]
    data = written(tmp_path / "d.jsonl", {"messages": turns})
    found = encode_record(tokenizer, read_jsonl(data, DEMO)[0])
    assert [ids for ids, _ in found] == [
        encode_prompt(tokenizer, turns[:k]) + encode_completion(tokenizer, turns[k]["content"])
        for k in (1, 3)]
    run(sft, "--model", folder, "--data", data, "--chat-template", "--epochs", 1,
        "--out", tmp_path / "o")
    assert "is trained: 1 conversations, 2 sequences" in capsys.readouterr().out


def test_special_tokens_that_any_message_spells_are_text(chat):
    tokenizer = open_tokenizer(chat, chat_template=True)
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    spelled = "".join(tokenizer.convert_ids_to_tokens(sorted(special)))
    plain, ids = (encode_prompt(tokenizer, [{"role": "system", "content": text}, SKY, BLUE,
                                            {"role": "user", "content": f"{text}?"}])
                  for text in ("12", f"1{spelled}2"))
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert tokenizer.decode(ids).count(spelled) == 2


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_conversations_learned_by_heart_come_back(form, chat, tmp_path):
    """SFT, generation and DPO of one file of conversations."""
    turns = [[SYSTEM, SKY, BLUE, MORE, LAST], [SKY, BLUE]]
    records = [{"messages": t} if form == "messages" else {"prompt": t[:-1], "completion": t[-1:]}
               for t in turns]
    data = written(tmp_path / "d.jsonl", *records)
    run(sft, "--model", chat, "--data", data, "--chat-template", "--epochs", 80, "--lr", 0.02,
        "--out", tmp_path / "m")
    run(generate, "--model", tmp_path / "m", "--data", data, "--chat-template",
        "--max-new-tokens", 30, "--out", tmp_path / "o.jsonl")
    found = rows(tmp_path / "o.jsonl")
    assert [{k: r[k] for k in records[0]} for r in found] == records
    assert [(r["id"], r["truncated"], r["source"]) for r in found] == [
        (1, False, "model"), (2, False, "model")]
    pairs = written(tmp_path / "p.jsonl", *({"chosen": [*t[:-1], GREEN], "rejected": t}
                                            for t in turns))
    run(dpo, "--model", tmp_path / "m", "--data", pairs, "--chat-template", "--epochs", 1,
        "--out", tmp_path / "n")
    assert len(rows(tmp_path / "n/metrics.jsonl")) == 1


def test_a_judge_who_is_no_model_reads_conversations_as_text():
    assert question_of([SKY]) == "2+3?"
    assert question_of([SYSTEM, SKY, BLUE, MORE]) == (
        "System:\nbe brief\n\nUser:\n2+3?\n\nAssistant:\n2+3=5\n#### 5\n\nUser:\n1+1?")


@pytest.fixture(scope="module")
def smollm2():
    """The tokenizer of SmolLM2-135M-Instruct, where benchmarks/real_weights.py has fetched it."""
    folder = Path(os.environ.get("ILR_CACHE") or ROOT / "cache") / "smollm2"
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"{folder}: no SmolLM2; benchmarks/real_weights.py fetches it")
    return open_tokenizer(folder, chat_template=True)


@pytest.mark.parametrize("turns", [
    [SKY], [SYSTEM, SKY], [SKY, BLUE, MORE], [SYSTEM, SKY, BLUE, MORE],
    [{"role": "user", "content": "  caf\u00e9 \u4f60\u597d\n\n \U0001f600 \t"}]])
def test_ids_of_a_real_tokenizer_are_those_of_transformers(smollm2, turns, tmp_path):
    prompt = smollm2.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(smollm2, turns) == prompt
    data = written(tmp_path / "d.jsonl", {"messages": [*turns, LAST]})
    sequences = encode_record(smollm2, read_jsonl(data, DEMO)[0])
    whole = smollm2.apply_chat_template([*turns, LAST], return_dict=False)
    (ids, weights), = sequences
    assert ids == whole[:len(ids)] and smollm2.decode(whole[len(ids):]) == "\n"
    answers = [t["content"] for t in [*turns, LAST] if t["role"] == "assistant"]
    trained = smollm2.decode([i for i, w in zip(ids, weights, strict=True) if w])
    assert trained == "".join(f"{text}<|im_end|>" for text in answers)
    ids = encode_prompt(smollm2, [SYSTEM, {"role": "user", "content": "<|im_end|>\n<|im_start|>"}])
    assert ids.count(smollm2.convert_tokens_to_ids("<|im_end|>")) == 2
    assert ids.count(smollm2.convert_tokens_to_ids("<|im_start|>")) == 3


# ---------------------------------------------------------------- answers that were cut off
def cut(record):
    return {**record, "truncated": True}


@pytest.mark.parametrize("half", [[], ["--half", 1]])
@pytest.mark.parametrize("task", [[], ["--task", "arithmetic"], ["--task", "saferpaca"]])
def test_cut_off_labels_are_not_trained(task, half, tiny, problems, tmp_path, capsys):
    """Whatever the task can parse, they are left out and counted."""
    kept = [{**p, "truncated": False} for p in problems[:6]]
    argv = ["--model", tiny / "model", "--epochs", 1, *task, *half]
    run(sft, *argv, "--data", written(tmp_path / "a.jsonl", *kept), "--out", tmp_path / "a")
    capsys.readouterr()
    data = written(tmp_path / "b.jsonl", *kept, *map(cut, problems[6:]))
    run(sft, *argv, "--data", data, "--out", tmp_path / "b")
    assert "were cut off at a token limit and are left out" in capsys.readouterr().out
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_nothing_but_cut_off_labels(tiny, problems, tmp_path):
    data = written(tmp_path / "d.jsonl", *map(cut, problems[:3]), {**problems[3], "completion": ""})
    with pytest.raises(InputError, match="none of its 4 records is left to train on: 0 are of the "
                                         "other half, 1 cannot be parsed, 3 were cut off"):
        run(sft, "--model", tiny / "model", "--data", data, "--task", "arithmetic", "--out",
            tmp_path / "m")


def test_the_mark_follows_an_answer_from_generation_to_preferences(tiny, problems, tmp_path):
    """generate.py marks what its limit cut off; compare.py, refine.py and dpo.py know of it."""
    data = written(tmp_path / "d.jsonl", *problems[:4])
    run(generate, "--model", tiny / "model", "--data", data, "--max-new-tokens", 3,
        "--temperature", 1, "--num-samples", 2, "--out", tmp_path / "s.jsonl")
    samples = rows(tmp_path / "s.jsonl")
    assert sum(r["truncated"] for r in samples) > 4
    run(compare, "score", "--judge", "oracle", "--task", "arithmetic", "--a", tmp_path / "s.jsonl",
        "--out", tmp_path / "c.jsonl")
    for c in rows(tmp_path / "c.jsonl"):
        sides = [r for r in samples if r["id"] == c["id"]]
        assert [c.get(f"truncated_{x}", False) for x in "ab"] == [r["truncated"] for r in sides]
    judged = [{**c, "agree": False, "prob_b": p} for c, p in
              zip(rows(tmp_path / "c.jsonl"), (0.9, 0.1, 0.8, 0.2), strict=True)]
    run(refine, "--method", "pairs", "--max-replace", 1, "--out", tmp_path / "p.jsonl",
        "--comparisons", written(tmp_path / "c2.jsonl", *judged))
    for pair in rows(tmp_path / "p.jsonl"):
        flags = {r["completion"]: r["truncated"] for r in samples if r["id"] == pair["id"]}
        for side in ("chosen", "rejected"):
            assert pair.get(f"{side}_truncated", False) == flags[pair[side]]
        assert not {"truncated_a", "truncated_b"} & set(pair)
    only = [{**p, "chosen_truncated": True} for p in rows(tmp_path / "p.jsonl")]
    with pytest.raises(InputError, match="all of its 4 chosen completions .* were cut off"):
        run(dpo, "--model", tiny / "model", "--data", written(tmp_path / "q.jsonl", *only),
            "--out", tmp_path / "m")


def test_pairs_whose_chosen_side_was_cut_off_are_not_trained(tiny, problems, tmp_path, capsys):
    pairs = [{**p, "rejected_truncated": True} for p in preferences(problems[:4])]
    more = [{**p, "chosen_truncated": True} for p in preferences(problems[4:7])]
    for name, records in (("a", pairs), ("b", pairs + more)):
        data = written(tmp_path / f"{name}.jsonl", *records)
        run(dpo, "--model", tiny / "model", "--data", data, "--epochs", 1, "--out", tmp_path / name)
    assert "3 of 7 chosen completions were cut off" in capsys.readouterr().out
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


@pytest.mark.parametrize("method", ["ilr", "naive"])
def test_a_replaced_label_has_the_mark_of_its_proposal(method, tmp_path, capsys):
    marks = [{"truncated": True}, {"truncated": False}, {"truncated": True}, {}]
    labels = [{"id": i, "prompt": "q", "completion": "old", **m} for i, m in enumerate(marks)]
    proposals = [{"id": i, "prompt": "q", "completion": "new", "truncated": i > 0, "reference": 1}
                 for i in range(4)]
    a, b = written(tmp_path / "a.jsonl", *labels), written(tmp_path / "b.jsonl", *proposals)
    more = ["--proposals", b]
    if method == "ilr":
        run(compare, "score", "--judge", "oracle", "--task", "arithmetic", "--b", b, "--out",
            tmp_path / "c.jsonl", "--a",
            written(tmp_path / "r.jsonl", *({**r, "reference": "1"} for r in labels)))
        found = [{**c, "agree": False, "prob_b": 0.9} for c in rows(tmp_path / "c.jsonl")]
        more = ["--comparisons", written(tmp_path / "c2.jsonl", *found)]
    run(refine, "--method", method, "--max-replace", 1, "--labels", a, *more,
        "--out", tmp_path / "o.jsonl")
    found = rows(tmp_path / "o.jsonl")
    replaced = [r for r in found if r["accepted"]]
    assert len(replaced) >= 3       # ILR's rule never takes them all
    cut = sum(r["truncated"] for r in replaced)
    said = capsys.readouterr().out
    assert f"{cut} of the {len(replaced)} proposals accepted were cut off at a token limit" in said
    assert all(r["truncated"] == (r["id"] > 0) for r in replaced)
    assert all(r.get("truncated") == labels[r["id"]].get("truncated")
               for r in found if not r["accepted"])


@pytest.mark.parametrize("name", baselines.names())
def test_baselines_keep_the_mark(name, tmp_path):
    """Every record that a method makes of a text that was cut off says so, and no other does."""
    module, texts = baselines.load(name), {True: "2+3\n#### 1", False: "2+4\n#### 2"}
    folder, start = tmp_path / "run", tmp_path / "run/weak/labels.jsonl"

    def record(i, which, **more):
        return {"id": i, "prompt": "q", "completion": texts[which], "reference": "2",
                "truncated": which, **more}

    def comparison(i):
        return {"id": i, "pair": 0, "prompt": "q", "completion_a": texts[i % 2 == 0],
                "completion_b": texts[i % 2 == 1], f"truncated_{'ab'[i % 2]}": True,
                "agree": False, "prob_b_ab": (i + 1) / 30, "prob_b_ba": 1 - (i + 1) / 30,
                "prob_b": (i + 1) / 30}
    makes = {"labels": lambda i: record(i, i % 2 == 0), "comparisons": comparison,
             "samples": lambda i: record(i, i % 3 == 0, sample=0),
             "refined": lambda i: record(i, i % 2 == 1, accepted=i % 3 > 0,
                                         source=("weak", "proposal")[i % 3 > 0])}
    for kind, path in [("labels", start), *module.reads(folder, 1, start)]:
        write_jsonl(path, map(makes[kind], range(24)))
    write_jsonl(tmp_path / "q.jsonl", [record(i, False) for i in range(24)])
    baselines.run(baselines.parser(name).parse_args([
        "--run", str(folder), "--task", "arithmetic", "--out", str(tmp_path / "o.jsonl"),
        "--max-replace", "1", "--questions", str(tmp_path / "q.jsonl")]))
    marks = [("completion", "truncated"), ("chosen", "chosen_truncated"),
             ("rejected", "rejected_truncated")]
    found = [(r[side], bool(r.get(mark))) for r in rows(tmp_path / "o.jsonl")
             for side, mark in marks if side in r]
    assert set(found) == {(text, was_cut) for was_cut, text in texts.items()}


def test_label_noise_takes_the_mark_off(tmp_path):
    labels = [{"id": i, "prompt": "q", "completion": f"#### {i}", "reference": f"{i}",
               "truncated": True} for i in range(6)]
    a = written(tmp_path / "a.jsonl", *labels)
    run(label_noise, "--labels", a, "--proposals", a, "--task", "arithmetic", "--share", 0.5,
        "--out", tmp_path / "o.jsonl")
    assert [r["truncated"] for r in rows(tmp_path / "o.jsonl")] == [False] * 6


def test_noise_of_cut_off_labels_is_none(tmp_path):
    """SFT leaves them out, so they are not among the wrong labels asked for."""
    labels = [{"id": i, "prompt": "q", "completion": "#### 99" if i < 8 else f"#### {i}",
               "reference": f"{i}", "truncated": i % 2 == 0} for i in range(16)]
    a = written(tmp_path / "a.jsonl", *labels)
    b = written(tmp_path / "b.jsonl", *({**r, "completion": f"#### {r['id']}"} for r in labels))
    argv = ["--labels", a, "--proposals", b, "--task", "arithmetic", "--kind", "systematic"]
    run(label_noise, *argv, "--share", 0.25, "--out", tmp_path / "o.jsonl")
    wrong = [r for r in rows(tmp_path / "o.jsonl") if r["completion"] == "#### 99"]
    assert [r["id"] for r in wrong] == [1, 3, 5, 7] and not any(r["truncated"] for r in wrong)
    with pytest.raises(InputError, match="4 of 16 labels are wrong, .*parsed, or were cut off, do"):
        run(label_noise, *argv, "--share", 0.5, "--out", tmp_path / "p.jsonl")


# ---------------------------------------------------------------- nothing to learn
@pytest.fixture(scope="module")
def without_bos(tiny, tmp_path_factory):
    folder = with_template(tiny, tmp_path_factory.mktemp("bos") / "m", None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    assert open_tokenizer(folder).bos_token is None
    return folder


def test_a_record_without_a_token_to_learn(without_bos, tmp_path):
    """Neither prompt nor completion nor BOS: EOS, the first token, is no target. No 0/0."""
    nothing, some = {"prompt": "", "completion": ""}, {"prompt": "", "completion": "#### 1"}
    argv = ["--model", without_bos, "--batch-size", 1, "--epochs", 1]
    data = written(tmp_path / "a.jsonl", nothing, some, nothing)
    run(sft, *argv, "--data", data, "--out", tmp_path / "a")
    assert len(rows(tmp_path / "a/metrics.jsonl")) == 1
    pairs = [{"prompt": "", "chosen": "#### 1", "rejected": ""},
             {"prompt": "1", "chosen": "#### 1", "rejected": ""}]
    run(dpo, *argv, "--data", written(tmp_path / "p.jsonl", *pairs), "--loss", "ipo", "--out",
        tmp_path / "b")
    assert len(rows(tmp_path / "b/metrics.jsonl")) == 1
    with pytest.raises(InputError, match="no record fits --max-length 2 and has a token to learn"):
        run(sft, *argv, "--data", data, "--max-length", 2, "--out", tmp_path / "c")
    with pytest.raises(InputError, match="every completion is empty: nothing to learn"):
        run(sft, *argv, "--data", written(data, nothing), "--out", tmp_path / "c")


def test_preferences_of_equal_sides(tiny, problems, tmp_path, capsys):
    same = [{**p, "rejected": p["chosen"]} for p in preferences(problems[:3])]
    argv = ["--model", tiny / "model", "--epochs", 1, "--batch-size", 1]
    with pytest.raises(InputError, match="chosen and rejected are the same in every pair"):
        run(dpo, *argv, "--data", written(tmp_path / "a.jsonl", *same), "--out", tmp_path / "a")
    turns = {"chosen": [SKY, BLUE], "rejected": [SKY, BLUE]}
    assert one(tmp_path / "b.jsonl", turns, *PAIR)["chosen"] == BLUE["content"]
    data = written(tmp_path / "b.jsonl", *same, *preferences(problems[3:5]))
    run(dpo, *argv, "--data", data, "--out", tmp_path / "b")
    assert "3 of 5 pairs have the same text on both sides" in capsys.readouterr().out
    assert len(rows(tmp_path / "b/metrics.jsonl")) == 2


# ---------------------------------------------------------------- templates that write the date
DATED = "{{ strftime_now('%d %b %Y') }}\n" + TEMPLATE
# as Llama 3.2's
SYSTEM_DATED = ("{%- if not date_string is defined %}{%- set date_string = strftime_now("
                "'%Y-%m-%d') %}{%- endif %}{{ date_string }}\n" + TEMPLATE)


@pytest.fixture
def calendar(monkeypatch):
    """Set the day that the machine's clock shows."""
    monkeypatch.setenv("ILR_DATE", "")      # restored at the end, whatever a stage made of it

    def show(day):
        class Date(datetime.date):
            today = staticmethod(lambda: datetime.date.fromisoformat(day))

        clock = SimpleNamespace(date=Date, datetime=datetime.datetime)
        for module in (tokens, unfinished):
            monkeypatch.setattr(module, "datetime", clock)
    return show


@pytest.mark.parametrize("template, text", [(DATED, "31 Jan 2024"), (SYSTEM_DATED, "2024-01-31")])
def test_a_template_writes_the_date_of_the_run(template, text, tiny, tmp_path, monkeypatch):
    folder = with_template(tiny, tmp_path / "m", template)
    monkeypatch.setenv("ILR_DATE", "2024-01-31")
    tokenizer = open_tokenizer(folder, chat_template=True)
    expected = tokenizer(f"{text}\n", add_special_tokens=False).input_ids[:-1]
    assert encode_prompt(tokenizer, [SKY])[:len(expected)] == expected
    record = {"messages": [], "prompt": [SKY], "completion": "5"}
    assert encode_record(tokenizer, record)[0][0][:len(expected)] == expected
    for wrong in ("31.1.2024", "2024-02-30", "today"):
        monkeypatch.setenv("ILR_DATE", wrong)
        with pytest.raises(InputError, match="ILR_DATE is .*: expected a date such as"):
            open_tokenizer(folder, chat_template=True)


def test_without_a_run_the_date_is_todays(tiny, tmp_path, calendar):
    folder = with_template(tiny, tmp_path / "m", DATED.replace("%d %b %Y", "%Y"))
    found = []
    for day in ("2024-12-31", "2025-01-01"):
        calendar(day)
        tokenizer = open_tokenizer(folder, chat_template=True)
        found.append(tokenizer.decode(encode_prompt(tokenizer, [SKY])[:8]))
    assert "2024" in found[0].replace(" ", "") and "2025" in found[1].replace(" ", "")


def test_a_stage_that_was_killed_goes_on_with_the_day_it_began(tmp_path, calendar, monkeypatch):
    args, data = {"chat_template": True, "lr": 1}, written(tmp_path / "d.jsonl", {"id": 1})

    def begin(day, **more):
        monkeypatch.setenv("ILR_DATE", "")
        calendar(day)
        path = partial_path(sft.__file__, tmp_path / "out", {**args, **more}, [data])
        return path, os.environ["ILR_DATE"]
    path, day = begin("2024-12-31")
    claim(path)
    path.mkdir()
    assert day == "2024-12-31" and begin("2025-01-01") == (path, day) and path.exists()
    assert begin("2025-01-02", lr=2) == (path, "2025-01-02") and not path.exists()
    assert begin("2025-01-03", chat_template=False)[1] == ""


# ---------------------------------------------------------------- without a task
def test_the_oracle_needs_references_on_both_sides(tmp_path):
    a = written(tmp_path / "a.jsonl", {"prompt": "q", "completion": "#### 1", "reference": 1})
    b = written(tmp_path / "b.jsonl", {"prompt": "q", "completion": "#### 2"})
    with pytest.raises(InputError, match="b.jsonl:1: field 'reference' is missing"):
        run(compare, "score", "--judge", "oracle", "--task", "arithmetic", "--a", a, "--b", b,
            "--out", tmp_path / "c.jsonl")


@pytest.mark.parametrize("stage, words, message", [
    (compare, "score --judge oracle --a a --b b --out c", "--judge oracle needs --task"),
    (refine, "--method clean --labels a --out c", "--method clean needs --task")])
def test_what_grades_needs_a_task(stage, words, message):
    with pytest.raises(InputError, match=message):
        run(stage, *words.split())


# ---------------------------------------------------------------- docs/own-data.md
def commands(page, **values):
    """The commands of a page's bash blocks, as words; `values` replace variables that it sets."""
    variables, found = {}, []
    code = "\n".join(re.findall(r"^```bash\n(.*?)^```", page, re.S | re.M)).replace("\\\n", " ")
    code = re.sub(r"^for half in 1 2; do\n(.*?)done\n", lambda m: "".join(
        m[1].replace("$half", k) for k in "12"), code, flags=re.S | re.M)
    for part in re.split(r"^(cat > \S+ <<'END'\n.*?^END\n)", code, flags=re.S | re.M):
        if part.startswith("cat > "):
            first, *lines, _ = part.splitlines()
            found.append((first.split()[2], "".join(f"{line}\n" for line in lines)))
            continue
        for line in filter(str.strip, part.splitlines()):
            words = shlex.split(Template(line).substitute(variables), comments=True)
            if "=" in words[0]:
                variables.update({**dict(w.split("=", 1) for w in words), **values})
            elif words[0] == "python":
                found.append(words[1:])
            else:
                assert words == ["mkdir", "-p", "my"]
    return found


def test_the_pages_commands_run(chat, tmp_path, monkeypatch):
    """Every command of docs/own-data.md, against a judge that likes the second answer."""
    page = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")
    with judge_server() as url:
        todo = commands(page, JUDGE=url, CHAT=str(chat),
                        MODEL=str(ROOT / "bases/arithmetic-3189783026/seed_0/strong"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("ILR_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("ILR_DATE", "")
        (tmp_path / "my").mkdir()
        for command in todo:
            if isinstance(command, tuple):
                Path(command[0]).write_text(command[1])
            else:
                stage = importlib.import_module(command[0].removesuffix(".py"))
                run_stage(stage.parser(), stage.main, command[1:])
    assert len(todo) == 16 and [r["correct"] for r in rows("my/graded.jsonl")] == [0, 0]
    labels = rows("my/labels_1.jsonl")
    assert [r["id"] for r in labels] == [1, 2, 3, 4, 5, 6] and any(r["accepted"] for r in labels)
    assert not any("reference" in r or "correct" in r for r in labels)
    answers = rows("my/chat_answers.jsonl")
    assert [m["role"] for m in answers[0]["messages"]] == ["user", "assistant"]


@contextlib.contextmanager
def judge_server():
    """The URL of a server that answers every chat with B in one order, and with A in the other."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = asked["messages"][0]["content"]
            a, b = (re.search(f"<answer_{x}>(.*?)</answer_{x}>", text, re.S)[1] for x in "AB")
            content = "B" if b.strip() > a.strip() else "A"
            reply = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_ilr_on_conversations(tmp_path, monkeypatch):
    """Compared as text, refined, and written as they came; no reference, no task."""
    monkeypatch.setenv("ILR_CACHE", str(tmp_path / "cache"))
    labels = [{"messages": [SYSTEM, {"role": "user", "content": f"{k}+1?"}, {
        "role": "assistant", "content": "#### 1"}]} for k in range(4)]
    other = [{"messages": [*r["messages"][:-1], {"role": "assistant", "content": f"#### {k + 1}"}]}
             for k, r in enumerate(labels)]
    a, b = written(tmp_path / "a.jsonl", *labels), written(tmp_path / "b.jsonl", *other)
    with judge_server() as url:
        run(compare, "score", "--judge", url, "--judge-model", "m", "--a", a, "--b", b,
            "--out", tmp_path / "c.jsonl")
    run(refine, "--labels", a, "--comparisons", tmp_path / "c.jsonl", "--max-replace", 1,
        "--out", tmp_path / "o.jsonl")
    found = rows(tmp_path / "o.jsonl")
    assert [r["accepted"] for r in found] == [False, True, True, False]      # one less than asked
    for k, r in enumerate(found):
        assert r["messages"] == (other if r["accepted"] else labels)[k]["messages"]
        assert "prompt" not in r and "completion" not in r
    run(refine, "--method", "pairs", "--comparisons", tmp_path / "c.jsonl", "--max-replace", 1,
        "--out", tmp_path / "p.jsonl")
    assert rows(tmp_path / "p.jsonl")[0]["chosen"] == other[1]["messages"][-1:]
