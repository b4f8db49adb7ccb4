"""Prompts and completions as token ids: the same in training, generation and judging."""
import contextlib
import gc

from core.models import open_pretrained
from core.records import InputError


def user_prompt(question):
    """The prompt of a question to a base model, as in the paper's release (core/datasets.py)."""
    return f"USER:\n{question}\n\nASSISTANT:\n"


def question_of(prompt):
    """The inverse of `user_prompt`, for a chat model, whose template writes the roles itself."""
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
        if not tokenizer.chat_template:
            raise InputError(f"--chat-template: {path} has none; a base model gets the plain "
                             "prompt format")
        tokenizer.eos_token = end_of_turn(tokenizer, path)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no EOS token")
    return tokenizer


def end_of_turn(tokenizer, path):
    """The first special token after an answer in the chat format, else the tokenizer's EOS."""
    import jinja2
    try:
        b, c = (tokenizer.apply_chat_template([{"role": "user", "content": "a"},
                                               {"role": "assistant", "content": answer}],
                                              return_dict=False) for answer in "bc")
        chat_prompt(tokenizer, "a")
    except jinja2.TemplateError as e:
        raise InputError(f"--chat-template: that of {path} refuses a question and its answer "
                         f"({e})") from None
    added = tokenizer.added_tokens_decoder
    for i in b[first_difference(b, c):]:
        if i in added and added[i].special:
            return added[i].content
    return tokenizer.eos_token


def first_difference(a, b):
    """The index of the first pair of elements that differ, or the length of `a`."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def text_ids(tokenizer, text):
    """Token ids of plain text: "</s>" in it is read as text, never as the end of a sequence."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def chat_prompt(tokenizer, question):
    """Token ids of one question in the model's own chat format.

    Special tokens that the question spells out are text: where there are any, the question's
    own ids are put between what the template writes before and after it. Raises InputError if
    the template cannot be cut in two that way.
    """
    def templated(text):
        return tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                             add_generation_prompt=True, return_dict=False)
    added = tokenizer.added_tokens_decoder.values()
    if not any(t.special and t.content in question for t in added):
        return templated(question)
    a, b = templated("a"), templated("b")
    at = first_difference(a, b)
    if a[at + 1:] != b[at + 1:]:
        raise InputError("--chat-template: this one repeats the question or depends on it, and "
                         "the question spells out a special token")
    return a[:at] + text_ids(tokenizer, question) + a[at + 1:]


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, with BOS first if the tokenizer has one."""
    if getattr(tokenizer, "as_chat", False):
        return chat_prompt(tokenizer, question_of(prompt))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + text_ids(tokenizer, prompt)


def encode_completion(tokenizer, completion):
    """Token ids of a completion, with EOS last.

    It is tokenized apart from the prompt, so that no token spans the border.
    """
    return text_ids(tokenizer, completion) + [tokenizer.eos_token_id]


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
