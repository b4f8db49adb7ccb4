"""Models: opening, 4-bit weights, saving, and the device they are on."""
import contextlib
import logging
import os
from pathlib import Path

from core.adapters import add_lora, inner_linears, read_adapters
from core.distributed import deliver, first, gathered, local_world, rank, world
from core.memory import device_bytes
from core.records import InputError


def pick_device(name):
    """The torch.device `name`; without a name, cuda if there is one, else cpu.

    Each of several processes gets a GPU of its own. Raises InputError if there are too few.
    """
    import torch
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch {torch.__version__} finds no CUDA device here")
    if device.type == "cuda" and world() > 1:
        if local_world() > torch.cuda.device_count():
            raise InputError(f"{local_world()} processes on a machine with "
                             f"{torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def open_pretrained(auto_class, path, **kwargs):
    """`auto_class.from_pretrained` without remote code; InputError if `path` is no such folder."""
    from safetensors import SafetensorError
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0]
        raise InputError(f"{path}: not a model folder or hub name ({reason})") from None


def open_model(path, device, auto="AutoModelForCausalLM", load_in_4bit=False, shards=False,
               **kwargs):
    """The model of a folder or hub name, in bf16 on CUDA and fp32 elsewhere.

    load_in_4bit: linear layers but the head in 4 bits (NF4). What adapters have changed is
        smaller than a step of 4 bits, so a folder that was trained with adapters is opened as
        its base, in 4 bits, and the adapters.
    shards: `core.distributed.shard` will deal the model out. Of several processes only the
        first reads the weights, into main memory; with `shards` they stay there, without it
        every process gets a copy on its device.
    Raises InputError for what is no model, lacks weights, or is larger than the device.
    """
    import torch
    import transformers
    if load_in_4bit and shards and world() > 1:
        raise InputError("--load-in-4bit trains in one process; several shard the weights "
                         "instead, 16 bits each")
    adapters = read_adapters(path) if load_in_4bit else None
    if adapters:
        model = open_model(adapters.pop("base"), device, load_in_4bit=True)
        ranks = [len(tensor) for name, tensor in adapters.items() if name.endswith("lora_A")]
        add_lora(model, ranks[0])
        model.load_state_dict(adapters, strict=False)
        return model
    transformers.utils.logging.disable_progress_bar()
    # no warning that the judge's head is new
    transformers.utils.logging.set_verbosity_error()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    auto_class = getattr(transformers, auto)
    empty = refuse_too_large(path, auto_class, dtype, device, load_in_4bit, shards, kwargs)
    model = None
    if rank() == 0:
        model = read_model(path, auto_class, dtype, kwargs)
    elif empty is None:
        raise InputError(f"{path}: not a model that {auto} opens")
    else:
        model = empty
    if load_in_4bit:
        to_4bit(model, device, dtype)
    if world() == 1:
        return model.to(device)
    if not shards:
        deliver(model, device)
    return model


def refuse_too_large(path, auto_class, dtype, device, load_in_4bit, shards, kwargs):
    """The model without memory for its weights, on the meta device; None if it cannot be made.

    Raises InputError if the weights would be larger than the device, before they are read.
    """
    import torch
    from transformers import AutoConfig
    model, have = None, device_bytes(device)
    with torch.device("meta"), contextlib.suppress(ValueError):
        config = open_pretrained(AutoConfig, path, **kwargs)
        model = auto_class.from_config(config, dtype=dtype)
    if model is None:
        return None
    need = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    need *= (0.3 if load_in_4bit else 1) / (world() if shards else 1)
    if need > have:
        if load_in_4bit:
            advice = ""
        elif shards and world() > 1:
            advice = f" in each of {world()} processes; more share them"
        else:
            advice = "; --load-in-4bit, with --lora-rank, takes a third"
        raise InputError(f"{path}: its weights alone take {need / 1e9:.3g} GB of the "
                         f"{have / 1e9:.3g} GB of {device}{advice}")
    return model


def read_model(path, auto_class, dtype, kwargs):
    """The model of a folder in main memory; InputError if it is another kind or lacks weights."""
    model, info = open_pretrained(auto_class, path, dtype=dtype, use_safetensors=True,
                                  output_loading_info=True, **kwargs)
    judge = "SequenceClassification" in str(model.config.architectures)
    if auto_class.__name__ == "AutoModelForCausalLM" and judge:
        raise InputError(f"{path}: a judge, not a language model")
    new_heads = ("score.", "pooler.")
    missing = [name for name in info["missing_keys"] if not name.startswith(new_heads)]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise InputError(f"{path}: its weights lack {missing[0]}{more}")
    return model


def to_4bit(model, device, dtype):
    """All linear layers but the head in NF4 (QLoRA, arXiv 2305.14314), in place."""
    import bitsandbytes as bnb
    # no warning that it lacks faster kernels on a CPU
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name, layer in inner_linears(model, "--load-in-4bit"):
        deliver(layer, device)
        small = bnb.nn.Linear4bit(layer.in_features, layer.out_features,
                                  bias=layer.bias is not None, compute_dtype=dtype,
                                  quant_type="nf4", device="meta")
        small.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        small.bias = layer.bias
        # that kernel has no gradient, and it would stay on once a model was in eval mode
        small.support_avx512bf16_for_cpu = False
        model.set_submodule(name, small.to(device))


def count_weights(model, trained=False):
    """Number of weights of a model, or of its trained ones. 4-bit weights are two to a byte."""
    import torch
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters()
               if p.requires_grad or not trained)


def save_model(model, tokenizer, folder):
    """Write a `save_pretrained` folder of model and tokenizer, adapters merged into the weights.

    The adapters are also written as adapters.safetensors, for opening in 4 bits (`open_model`),
    joined with those that the base was merged from. The first of several processes writes.
    """
    # with several processes as variables, which shows which of them are tied
    weights = gathered(model.state_dict(keep_vars=world() > 1))
    first(lambda: _save_model(model, tokenizer, folder, weights))


def _save_model(model, tokenizer, folder, weights):
    import torch
    from safetensors.torch import save_file
    # ".weight." is in the names of what 4 bits are read by: weight.absmax and others
    state = {name.replace(".base.", "."): tensor for name, tensor in weights.items()
             if "lora_" not in name and ".weight." not in name}
    adapters, base = {}, model.name_or_path
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            weight = weights[f"{name}.base.weight"].detach()
            quantized = getattr(layer.base.weight, "quant_state", None)
            if quantized is not None:
                import bitsandbytes as bnb
                weight = bnb.functional.dequantize_4bit(weight, quantized)
            a, b = weights[f"{name}.lora_A"].detach(), weights[f"{name}.lora_B"].detach()
            adapters.update({f"{name}.lora_A": a.cpu(), f"{name}.lora_B": b.cpu()})
            state[f"{name}.weight"] = (weight + 2 * (b @ a)).to(weight.dtype).cpu()
    model.save_pretrained(folder, state_dict=state)
    if adapters:
        # if the base was trained with adapters too: B A + B' A' = [B B'] [A A']
        before = read_adapters(base) or {}
        here = str(Path(base).resolve()) if Path(base).exists() else base
        base = before.pop("base", here)
        for name in adapters.keys() & before.keys():
            pair = [before[name], adapters[name]]
            adapters[name] = torch.cat(pair, 0 if name.endswith("A") else 1)
        save_file(adapters, Path(folder) / "adapters.safetensors", {"base": base})
    tokenizer.save_pretrained(folder)
