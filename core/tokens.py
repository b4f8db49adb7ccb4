"""Prompts and completions as token ids: the same in training, generation and judging."""
import contextlib
import datetime
import gc
import os

from core.conversations import in_words
from core.models import open_pretrained
from core.records import InputError


def user_prompt(question):
    """The prompt of a question to a base model, as in the paper's release (core/datasets.py)."""
    return f"USER:\n{question}\n\nASSISTANT:\n"


def question_of(prompt):
    """The inverse of `user_prompt`, for a chat model, whose template writes the roles itself; of a
    conversation, its messages as one text."""
    if isinstance(prompt, list):
        return in_words(prompt)
    return prompt.removeprefix("USER:\n").removesuffix("\n\nASSISTANT:\n").strip()


def open_tokenizer(path, chat_template=False):
    """The tokenizer of a folder or hub name.

    chat_template: prompts become turns of a conversation (`tokenizer.as_chat`), and the EOS
    token becomes the token that ends a turn. Raises InputError if there is no chat template, if
    it refuses a question with its answer, or if there is no EOS token.
    """
    from transformers import AutoTokenizer
    tokenizer = open_pretrained(AutoTokenizer, path)
    gc.freeze()     # core.cli.run_stage switched the collector off while modules were imported
    gc.enable()
    tokenizer.as_chat = chat_template
    if chat_template:
        fix_date()
        if not tokenizer.chat_template:
            raise InputError(f"--chat-template: {path} has none; a base model gets the plain "
                             "prompt format")
        tokenizer.eos_token = end_of_turn(tokenizer, path)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no EOS token")
    return tokenizer


def fix_date():
    """Let chat templates that write the date write that of the run, ILR_DATE; without it today's.

    Raises InputError for what is no date. No template argument can do this: transformers hands a
    template no function but its own, so the clock that this one reads is replaced.
    """
    from transformers.utils import chat_template_utils
    day = os.environ.get("ILR_DATE") or datetime.date.today().isoformat()
    try:
        date = datetime.datetime.strptime(day, "%Y-%m-%d")
    except ValueError:
        raise InputError(f"ILR_DATE is '{day}': expected a date such as 2025-01-31") from None

    class Clock:
        now = staticmethod(lambda: date)
    chat_template_utils.datetime = Clock


def end_of_turn(tokenizer, path):
    """The first special token after an answer in the chat format, else the tokenizer's EOS."""
    try:
        b, c = (tokenizer.apply_chat_template([{"role": "user", "content": "a"},
                                               {"role": "assistant", "content": answer}],
                                              return_dict=False) for answer in "bc")
        chat_prompt(tokenizer, [{"role": "user", "content": "a"}])
    except Exception as e:      # a template is a program, which may raise anything
        raise InputError(f"--chat-template: that of {path} refuses a question and its answer "
                         f"({in_one_line(e)})") from None
    added = tokenizer.added_tokens_decoder
    for i in b[first_difference(b, c):]:
        if i in added and added[i].special:
            return added[i].content
    return tokenizer.eos_token


def in_one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def first_difference(a, b):
    """The index of the first pair of elements that differ, or the length of `a`."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def text_ids(tokenizer, text):
    """Token ids of plain text: "</s>" in it is read as text, never as the end of a sequence."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def chat_prompt(tokenizer, turns):
    """Token ids of messages in the model's own chat format, up to where the answer begins.

    Special tokens that a message spells out are text: such a message's own ids are put between what
    the template writes before and after it. Raises ValueError if it cannot be cut that way, and
    whatever the template itself raises.
    """
    def templated(turns):
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    spelled = [k for k, turn in enumerate(turns) if any(s in turn["content"] for s in special)]
    if any(s in turn["role"] for turn in turns for s in special):
        raise ValueError("a role spells out a special token")
    if not spelled:
        return templated(turns)
    short = [{**turn, "content": "a"} if k in spelled else turn for k, turn in enumerate(turns)]
    ids, texts = templated(short), {}       # texts: place in ids -> the message that belongs there
    for k in spelled:
        other = templated([*short[:k], {**turns[k], "content": "b"}, *short[k + 1:]])
        at = first_difference(ids, other)
        if ids[at + 1:] != other[at + 1:]:
            raise ValueError("it repeats a message or depends on it, and the message spells out a "
                             "special token")
        if at < len(ids):       # else the template leaves this message out
            texts[at] = turns[k]["content"]
    for at in sorted(texts, reverse=True):
        ids[at:at + 1] = text_ids(tokenizer, texts[at])
    return ids


def encode_prompt(tokenizer, prompt, place="a prompt"):
    """Token ids of a prompt, text or messages, with BOS first if the tokenizer has one.

    Raises InputError, which begins with `place`, for messages without --chat-template, and for
    those that the template refuses.
    """
    if getattr(tokenizer, "as_chat", False):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": question_of(prompt)}]
        try:
            return chat_prompt(tokenizer, prompt)
        except Exception as e:      # a template is a program, which may raise anything
            raise InputError(f"{place}: the chat template refuses its messages ({in_one_line(e)}): "
                             "correct them, or leave the record out") from None
    if isinstance(prompt, list):
        raise InputError(f"{place}: messages need --chat-template")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + text_ids(tokenizer, prompt)


def encode_completion(tokenizer, completion):
    """Token ids of a completion, with EOS last.

    It is tokenized apart from the prompt, so that no token spans the border.
    """
    return text_ids(tokenizer, completion) + [tokenizer.eos_token_id]


def encode_record(tokenizer, record, prompt_weight=0.0):
    """[(token ids, loss weight of each token)] of a demonstration: prompt, completion, EOS.

    Of a record with `messages`, every answer of the assistant's is trained: as one sequence, if the
    chat template writes the messages before an answer as they were trained, else as more. Either
    way an answer is trained behind the token ids behind which it would be generated.
    """
    turns, place = record["prompt"], getattr(record, "place", "a record")
    questions = [(turns, record["completion"])]
    if "messages" in record:
        questions = [(turns[:k], turn["content"]) for k, turn in enumerate(turns)
                     if turn["role"] == "assistant"] + questions
    sequences = []
    for prompt, completion in questions:
        prompt = encode_prompt(tokenizer, prompt, place)
        completion = encode_completion(tokenizer, completion)
        weights = [prompt_weight] * len(prompt)
        if sequences and prompt[:len(sequences[-1][0])] == sequences[-1][0]:
            _, before = sequences.pop()
            weights[:len(before)] = before
        sequences.append((prompt + completion, weights + [1.0] * len(completion)))
    return sequences


def stop_ids(tokenizer, model):
    """Token ids that end an answer, the tokenizer's EOS first.

    The others are those that the model's generation config, its config and the chat template name.
    Raises InputError if the model has no embedding for the tokenizer's EOS.
    """
    eos, known = tokenizer.eos_token_id, model.get_input_embeddings().weight.shape[0]
    if eos >= known:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer's EOS {tokenizer.eos_token} is "
                         f"token {eos}, but the model has only {known} embeddings: they do not "
                         "belong together")
    named = []
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        named += ids if isinstance(ids, (list, tuple)) else [ids]
    if tokenizer.chat_template:
        with contextlib.suppress(InputError):   # a template that refuses every answer ends none
            turn = end_of_turn(tokenizer, tokenizer.name_or_path)
            named.append(tokenizer.convert_tokens_to_ids(turn))
    return [eos, *sorted({i for i in named if i is not None and 0 <= i < known} - {eos})]


def set_stops(model, tokenizer):
    """Name all `stop_ids` in a model's configs, so that it stops in plain transformers too.

    In place, before training; the configs are saved with the model. InputError as `stop_ids`.
    """
    ids = stop_ids(tokenizer, model)
    for config in (model.generation_config, model.config):
        config.eos_token_id = ids if len(ids) > 1 else ids[0]
