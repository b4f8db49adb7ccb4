"""Conversations, as Hugging Face TRL has them in data: lists of messages {role, content}.

In memory a prompt is text or a list of messages that ends with the user's, and an answer
(`completion`, `chosen`, `rejected`) is always text. In a file the answer to a conversation is a
list of one message, or stands with its prompt in one list, `messages`. core/records.py calls
`unfolded` where it reads, and `folded` where it writes.

What cannot be taken raises ValueError, which says what to do.
"""
import os.path
import re

ANSWERS = ("completion", "chosen", "rejected")
FORMS = ("messages", "conversations", "prompt", *ANSWERS)
SHAREGPT = {"human": "user", "gpt": "assistant"}        # roles of messages {from, value}
# What a template or a model reads besides a message's role and content, and no stage does.
UNREAD = ("tool_calls", "function_call", "tool_call_id", "tools", "functions", "images", "image",
          "videos", "video", "audios", "audio", "documents", "chat_template_kwargs")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
ASKED = ("question", "instruction", "input", "query")       # a question, where `prompt` is missing
TRAINED = re.compile("(is_|to_|should_)?(train|loss|weight|learn)")     # "is it trained?": 1, true


def unfolded(record, fields):
    """A record of a file as stages hold it; `fields` are those that the stage needs.

    A record that came with `messages` keeps that key, which says that every answer in it is
    trained, and how it is written.
    """
    if not {"prompt", "completion", "chosen"} & set(fields):
        return record
    if "prompt" in fields:
        only_text(record)
        for key in ("system", "system_prompt"):
            if record.get(key):
                raise ValueError(f"`{key}` is not read: write it as the first message, or into the "
                                 "prompt")
    # tables of several forms fill what a record does not have with nulls or empty lists
    filled = any(record.get(k) for k in FORMS)
    record = {k: v for k, v in record.items()
              if k not in FORMS or not (v is None or v == [] and filled)}
    if isinstance(record.get("conversations"), list):
        if "messages" in record:
            raise ValueError("has `messages` and `conversations`: leave one of them out")
        record = {"messages" if k == "conversations" else k: v for k, v in record.items()}
    if "chosen" in fields:
        return preference(record)
    if "messages" in record:
        return whole(record, "completion" in fields)
    prompt, completion = record.get("prompt"), record.get("completion")
    if "prompt" in record and "completion" in record:
        same_form(prompt=prompt, completion=completion)
    if isinstance(prompt, list):
        record = {**record, "prompt": asking(messages(record, "prompt"), "prompt")}
    if isinstance(completion, list):
        record = {**record, "completion": answer(messages(record, "completion"), "completion")}
    return record


def whole(record, answered):
    """A record with `messages`: the last answer is its completion, what is before it the prompt.
    answered: whether the stage needs an answer. A `prompt` beside `messages` repeats their first.
    """
    if record.get("completion"):
        raise ValueError("has `messages` and `completion`: leave one of them out")
    turns = messages(record, "messages")
    for before, turn in zip([{"role": "nobody"}, *turns], turns, strict=False):
        if turn["role"] == "assistant":
            answer([turn], "messages")
            if before["role"] != "user":
                raise ValueError("an assistant's message in `messages` follows no user's: begin "
                                 "with the user's, and join what follows one another")
    if turns[-1]["role"] == "assistant":
        return {**record, "prompt": turns[:-1], "completion": turns[-1]["content"]}
    if answered:
        raise ValueError(f"the last of `messages` is the {turns[-1]['role']}'s: end with the "
                         "assistant's, which is learned")
    return {**record, "prompt": asking(turns, "messages")}


def preference(record):
    """A preference. Without a prompt, or where only the answers are lists, the prompt is what
    chosen and rejected have in common at their beginning, as in TRL. In ShareGPT's form, as
    LLaMA-Factory has it, each answer is a message and the prompt is `conversations`."""
    sides = {k: record[k] for k in ("chosen", "rejected") if k in record}
    if len(sides) < 2:
        return record
    if record.get("truncated"):
        raise ValueError("`truncated` does not say which answer of a preference was cut off: write "
                         "`chosen_truncated` or `rejected_truncated`")
    if all(isinstance(side, dict) for side in sides.values()):
        sides = {k: [side] for k, side in sides.items()}
        record = {"prompt": record.get("messages"), **record, **sides}
    same_form(**sides)
    prompt = record.get("prompt")
    if isinstance(record["chosen"], list):
        chosen, rejected = (messages(record, k) for k in sides)
        if isinstance(prompt, list):
            prompt = messages(record, "prompt")
        else:
            same = 0
            while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
                same += 1
            prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
            if not prompt or len(chosen) > 1 or len(rejected) > 1:
                raise ValueError("`chosen` and `rejected` must have all messages but the last in "
                                 "common, the user's question at least: give it as `prompt`, a list"
                                 " of messages")
        return {**record, "prompt": asking(prompt, "prompt"),
                "chosen": answer(chosen, "chosen"), "rejected": answer(rejected, "rejected")}
    if isinstance(prompt, list):
        same_form(prompt=prompt, **sides)
    if "prompt" in record or not all(isinstance(side, str) for side in sides.values()):
        return record
    for key in ASKED:
        if record.get(key):
            raise ValueError(f"`{key}` is not read: give the question as `prompt`")
    # whole words: the space before the first word that differs belongs to the answers
    same = os.path.commonprefix([*sides.values()])
    same = same[:max(same.rfind(" "), same.rfind("\n") + 1, 0)]
    if not same:
        raise ValueError("`chosen` and `rejected` have no beginning in common: give the question "
                         "as `prompt`")
    return {**record, "prompt": same, **{k: text[len(same):] for k, text in sides.items()}}


def same_form(**values):
    """Refuse a text and a conversation in one record."""
    lists = [name for name, value in values.items() if isinstance(value, list)]
    texts = [name for name in values if name not in lists]
    if lists and texts:
        raise ValueError(f"`{lists[0]}` is a conversation and `{texts[0]}` is not: write both as "
                         "text, or both as lists of messages")


def messages(record, name):
    """The messages of a field, their contents as text."""
    if not isinstance(record[name], list):
        raise ValueError(f"`{name}` must be a list of messages, {{role, content}}")
    if not record[name]:
        raise ValueError(f"`{name}` is an empty conversation")
    return [message(m, name) for m in record[name]]


def only_text(given):
    """Refuse a record, or a message, that has more than text to be read."""
    for key in UNREAD:
        if given.get(key) and given[key] not in ("[]", "{}"):
            raise ValueError(f"`{key}` is not taken, only text is: leave the record out, or the "
                             "field")


def message(given, name):
    """One message {role, content, ...}; those of ShareGPT have `from` and `value`."""
    if isinstance(given, dict) and "from" in given and "value" in given:
        role, more = given["from"], {k: v for k, v in given.items()
                                     if k not in ("from", "value", "role", "content")}
        given = {"role": SHAREGPT.get(role, role) if isinstance(role, str) else role,
                 "content": given["value"], **more}
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise ValueError(f"`{name}` must be a list of messages, {{role, content}}")
    given = {k: v for k, v in given.items() if v is not None}
    content = given.get("content")
    only_text(given)
    if given["role"] in ("tool", "function"):
        raise ValueError(f"`{name}` holds tool calls, which no stage takes: leave the record out")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text"
                   and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"a content in `{name}` is not text alone: leave the record out")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"a message in `{name}` has no content: expected text")
    return {**given, "content": content}


def asking(turns, name):
    """The messages of a prompt, of which the last must be the user's."""
    if turns[-1]["role"] != "user":
        raise ValueError(f"the last message of `{name}` is the {turns[-1]['role']}'s: end with the "
                         "user's, which is answered")
    return turns


def answer(turns, name):
    """The text of an answer, one message of the assistant's."""
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise ValueError(f"`{name}` must be one message of the assistant's: earlier ones belong to "
                         "`prompt`, or all of them into `messages`")
    for key in THOUGHTS:
        if turns[0].get(key):
            raise ValueError(f"`{key}` of an answer in `{name}` is not read: write it into the "
                             "content as the model writes it")
    for key, value in turns[0].items():
        # a flag of another name, such as `ignore`, may say that the answer is not trained
        flagged = value is True or (key.startswith("mask") and value)
        if (value != 1) if TRAINED.match(key) else flagged:
            raise ValueError(f"`{key}` of an answer in `{name}` is not read, and every answer is "
                             "trained: leave the field out, or the record")
    return turns[0]["content"]


def folded(record):
    """A record as it is written: the inverse of `unfolded`."""
    if not isinstance(record.get("prompt"), list):
        return record
    record = {k: [{"role": "assistant", "content": v}] if k in ANSWERS and isinstance(v, str)
              else v for k, v in record.items()}
    if "messages" in record:
        record["messages"] = record.pop("prompt") + record.pop("completion", [])
    return record


def in_words(turns):
    """A conversation as text, for a judge who is no model here."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}:\n{turn['content']}" for turn in turns)
