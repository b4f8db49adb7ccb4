"""Models and their tokens, once for trainers, sampler and judge: opening, adapters, 4-bit weights, saving, and the token ids of
prompts and completions, which are the same in training, generation and judging."""
import contextlib
import gc
import logging
import os
import statistics
from pathlib import Path

from tasks import InputError, question_of, warm
from tasks._judges import Endpoint, is_url
from tasks._memory import device_bytes
from tasks._parallel import deliver, first, gathered, local_world, rank, world


def pick_device(name):
    import torch
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch {torch.__version__} finds no CUDA device here")
    if device.type == "cuda" and world() > 1:       # a GPU for each process
        if local_world() > torch.cuda.device_count():
            raise InputError(f"{local_world()} processes on a machine with {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def open_pretrained(auto_class, path, **kwargs):
    """`auto_class.from_pretrained`, safetensors only and without remote code; a folder that is no model is bad input."""
    from safetensors import SafetensorError
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        raise InputError(f"{path}: not a model folder or hub name ({str(e).strip().splitlines()[0]})") from None


def open_tokenizer(path, chat_template=False):
    """The tokenizer of a folder. With `chat_template` its prompts become turns of a conversation, and its EOS the token that
    ends a turn."""
    from transformers import AutoTokenizer
    tokenizer = open_pretrained(AutoTokenizer, path)
    gc.freeze()
    gc.enable()
    tokenizer.as_chat = chat_template
    if chat_template:
        if not tokenizer.chat_template:
            raise InputError(f"--chat-template: {path} has none; a base model gets the plain prompt format")
        import jinja2
        try:
            turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}] for answer in "bc"]
            b, c = (tokenizer.apply_chat_template(turn, return_dict=False) for turn in turns)
            chat_prompt(tokenizer, "a")
        except jinja2.TemplateError as e:
            raise InputError(f"--chat-template: that of {path} refuses a question and its answer ({e})") from None
        at, added = next((i for i, (x, y) in enumerate(zip(b, c)) if x != y), len(b)), tokenizer.added_tokens_decoder
        tokenizer.eos_token = next((added[i].content for i in b[at:] if i in added and added[i].special), tokenizer.eos_token)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no EOS token")
    return tokenizer


def open_model(path, device, auto="AutoModelForCausalLM", load_in_4bit=False, shards=False, **kwargs):
    """The model of a folder in bf16 on CUDA and fp32 elsewhere; its linear layers but the head in 4 bits if asked. What
    adapters have changed is smaller than a step of 4 bits: a folder that has them is opened as its base and the adapters.

    Of several processes only the first reads the weights, into main memory. Each then gets a copy on its device; with `shards`
    none does, and `tasks._parallel.shard` deals the model out."""
    import torch
    import transformers
    if load_in_4bit and shards and world() > 1:
        raise InputError("--load-in-4bit trains in one process; several shard the weights instead, 16 bits each")
    adapters = read_adapters(path) if load_in_4bit else None
    if adapters:
        model = open_model(adapters.pop("base"), device, load_in_4bit=True)
        add_lora(model, next(len(tensor) for name, tensor in adapters.items() if name.endswith("lora_A")))
        model.load_state_dict(adapters, strict=False)
        return model
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()      # that the judge's head is new is no news
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    need, have, model = 0, device_bytes(device), None
    with torch.device("meta"), contextlib.suppress(ValueError):      # its size, before gigabytes are fetched and read
        model = getattr(transformers, auto).from_config(open_pretrained(transformers.AutoConfig, path, **kwargs), dtype=dtype)
        need = sum(p.numel() for p in model.parameters()) * dtype.itemsize * (0.3 if load_in_4bit else 1) / (world() if shards else 1)
    if need > have:
        raise InputError(f"{path}: its weights alone take {need / 1e9:.3g} GB of the {have / 1e9:.3g} GB of {device}"
                         + ("" if load_in_4bit else f" in each of {world()} processes; more share them" if shards and world() > 1 else
                            "; --load-in-4bit, with --lora-rank, takes a third"))
    if rank() == 0:
        model, info = open_pretrained(getattr(transformers, auto), path, dtype=dtype, use_safetensors=True,
                                      output_loading_info=True, **kwargs)
        if auto == "AutoModelForCausalLM" and "SequenceClassification" in str(model.config.architectures):
            raise InputError(f"{path}: a judge, not a language model")
        missing = [name for name in info["missing_keys"] if not name.startswith(("score.", "pooler."))]     # heads that are new
        if missing:
            raise InputError(f"{path}: its weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    elif model is None:
        raise InputError(f"{path}: not a model that {auto} opens")
    if load_in_4bit:
        import bitsandbytes as bnb
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)       # that it lacks faster kernels on a CPU
        for name, layer in inner_linears(model, "--load-in-4bit"):      # NF4 (QLoRA, arXiv 2305.14314), on the way to the device
            deliver(layer, device)
            small = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype,
                                      quant_type="nf4", device="meta")
            small.weight, small.bias = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4"), layer.bias
            small.support_avx512bf16_for_cpu = False        # that kernel has no gradient, and stays once a model was in eval mode
            model.set_submodule(name, small.to(device))
    if world() == 1:
        return model.to(device)
    if not shards:
        deliver(model, device)
    return model


def count_weights(model, trained=False):
    """Number of weights of a model, or of those that are trained; 4-bit ones lie two in a byte."""
    import torch
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters() if p.requires_grad or not trained)


def read_adapters(folder):
    """{"base": model that they belong to, parameter: tensor} of a folder that `save_model` wrote from 4-bit weights, else None."""
    from safetensors import SafetensorError, safe_open
    path = Path(folder) / "adapters.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as f:
            return {"base": f.metadata()["base"], **{name: f.get_tensor(name) for name in f.keys()}}
    except (OSError, SafetensorError, TypeError, KeyError) as e:
        raise InputError(f"{path}: not adapters that a stage wrote ({e})") from None


def inner_linears(model, flag):
    """[(name, linear layer)] of all linear layers but the head."""
    import torch
    found = [(name, layer) for name, layer in model.named_modules()
             if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings()]
    if not found:
        raise InputError(f"{flag}: the model has no linear layers")
    return found


def add_lora(model, rank):
    """Freeze the model and give every linear layer but the head an adapter (LoRA, arXiv 2106.09685, equation 3):
    y = Wx + 2 BAx, so alpha = 2 rank as in the paper; A (rank, in) and B (out, rank) in fp32, B = 0 at the start."""
    import torch

    class LoraLinear(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, device = base, base.weight.device
            a, b = torch.empty(rank, base.in_features), torch.zeros(base.out_features, rank)
            torch.nn.init.kaiming_uniform_(a, a=5 ** 0.5)       # drawn in main memory: one process or several, the same
            self.lora_A, self.lora_B = torch.nn.Parameter(a.to(device)), torch.nn.Parameter(b.to(device))

        def forward(self, x):
            return self.base(x) + 2 * (x @ self.lora_A.T.to(x.dtype)) @ self.lora_B.T.to(x.dtype)

    present = [p for name, p in model.named_parameters() if name.endswith("lora_A")]
    if present:         # opened with adapters: they are trained on
        if len(present[0]) != rank:
            raise InputError(f"--lora-rank {rank}: the model has adapters of rank {len(present[0])}")
        return
    model.requires_grad_(False)
    for name, layer in inner_linears(model, "--lora-rank"):
        model.set_submodule(name, LoraLinear(layer))


def save_model(model, tokenizer, folder):
    """A `save_pretrained` folder of model and tokenizer, adapters merged into the weights. The adapters stand beside it once more, for
    those who open it in 4 bits (open_model), with those that its base was merged from. Of several processes the first writes; all wait."""
    weights = gathered(model.state_dict(keep_vars=world() > 1))     # as variables: which of them are tied
    first(lambda: _save_model(model, tokenizer, folder, weights))


def _save_model(model, tokenizer, folder, weights):
    import torch
    from safetensors.torch import save_file
    state = {name.replace(".base.", "."): tensor for name, tensor in weights.items()
             if "lora_" not in name and ".weight." not in name}      # weight.absmax, ...: what 4 bits are read by
    adapters, base = {}, model.name_or_path
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            weight, quantized = weights[f"{name}.base.weight"].detach(), getattr(layer.base.weight, "quant_state", None)
            if quantized is not None:
                import bitsandbytes as bnb
                weight = bnb.functional.dequantize_4bit(weight, quantized)
            a, b = weights[f"{name}.lora_A"].detach(), weights[f"{name}.lora_B"].detach()
            adapters.update({f"{name}.lora_A": a.cpu(), f"{name}.lora_B": b.cpu()})
            state[f"{name}.weight"] = (weight + 2 * (b @ a)).to(weight.dtype).cpu()
    model.save_pretrained(folder, state_dict=state)
    if adapters:
        before = read_adapters(base) or {}      # of a base that was itself trained with adapters: B A + B' A' = [B B'] [A A']
        base = before.pop("base", str(Path(base).resolve()) if Path(base).exists() else base)
        adapters = {name: torch.cat([before[name], value], 0 if name.endswith("A") else 1) if name in before else value
                    for name, value in adapters.items()}
        save_file(adapters, Path(folder) / "adapters.safetensors", {"base": base})
    tokenizer.save_pretrained(folder)


def text_ids(tokenizer, text):
    """Token ids of plain text: a "</s>" that a model wrote is five characters here, never the end of a sequence."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def chat_prompt(tokenizer, question):
    """Token ids of one question in the model's own chat format."""
    spelled_out = any(t.special and t.content in question for t in tokenizer.added_tokens_decoder.values())
    a, b = (tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
            for text in (["a", "b"] if spelled_out else [question] * 2))
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
    if a[at + 1:] != b[at + 1:]:
        raise InputError("--chat-template: this one repeats the question or depends on it, and the question spells out a special token")
    return a[:at] + text_ids(tokenizer, question) + a[at + 1:] if spelled_out else a      # special tokens spelled out are text


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, BOS first where the tokenizer has one: the same in training, generation and judging."""
    if getattr(tokenizer, "as_chat", False):
        return chat_prompt(tokenizer, question_of(prompt))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + text_ids(tokenizer, prompt)


def encode_completion(tokenizer, completion):
    """Token ids of a completion, EOS last. Tokenized apart from the prompt, so that the border never merges."""
    return text_ids(tokenizer, completion) + [tokenizer.eos_token_id]


def embed(embedder, texts, device):
    """{text: fp32 vector on the CPU}: an endpoint's embedding, where `embedder` is its URL, else the mean of a model's last hidden
    states over the text's first 1,024 tokens."""
    import torch
    if is_url(embedder):
        model = os.environ.get("ILR_EMBEDDER_MODEL", "text-embedding-3-large")
        return {text: torch.tensor(vector) for text, vector in first(
            lambda: Endpoint(embedder, model, "ILR_EMBEDDER").embeddings(texts)).items()}
    from tqdm import tqdm
    from transformers import AutoTokenizer
    tokenizer, found = open_pretrained(AutoTokenizer, embedder), {}
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = pick_device(device)
    model = open_model(embedder, device, "AutoModel").eval()
    texts = sorted(texts, key=lambda t: (len(t), t))
    for start in tqdm(range(0, len(texts), 64), desc="embed", unit="batch", mininterval=1, leave=False):
        block = texts[start:start + 64]
        batch = tokenizer([t or " " for t in block], padding=True, padding_side="right", truncation=True,
                          max_length=min(tokenizer.model_max_length, 1024), return_tensors="pt").to(device)
        with torch.inference_mode():
            hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        found.update(zip(block, ((hidden * mask).sum(1) / mask.sum(1)).cpu()))
    return found


def agreements(args, task, pairs):
    """Whether the two records of each pair give the same answer: by the task's rule; where it has none, if their texts are
    equal or their embeddings' cosine is above the median pair's (the release's experiments/ilr.py)."""
    def by_rule():
        warm(task, *zip(*pairs))
        return [task.agree(a, b) for a, b in pairs]
    if hasattr(task, "agree"):
        return first(by_rule)
    if not args.embedder:
        raise InputError(f"--task {args.task} compares answers by their embeddings: name an --embedder")
    import torch
    vectors = embed(args.embedder, sorted({r["completion"] for pair in pairs for r in pair}), args.device)
    alike = [torch.cosine_similarity(vectors[a["completion"]], vectors[b["completion"]], dim=0).item() for a, b in pairs]
    median = statistics.median(alike)
    return first(lambda: [a["completion"] == b["completion"] or x > median for (a, b), x in zip(pairs, alike)])
