"""Models: opening, 4-bit weights, saving, and the device they are on."""
import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

from core.adapters import inner_linears, merge_adapters, put_adapters, read_adapters, write_adapters
from core.distributed import deliver, first, gathered, local_world, rank, world
from core.memory import free_bytes
from core.precision import join, keep_exact, set_exact, split
from core.records import InputError, write_json

# Beside model.safetensors, but in a folder of its own: vLLM and others read every *.safetensors
# file of a model folder as weights.
REMAINDER = "exact/remainder.safetensors"


def add_device_flags(p):
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    p.add_argument("--dtype", choices=["float32", "bfloat16"],
                   help="what weights are computed in (default: bfloat16 on CUDA, else float32); "
                   "training keeps their exact fp32 values in any case")


def pick_device(name):
    """The torch.device `name`; without a name, cuda if there is one, else cpu.

    Each of several processes gets a GPU of its own. Raises InputError if there are too few.
    """
    import torch
    there = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if there else "cpu"))
    if device.type == "cuda" and not there:
        raise InputError(f"--device {name}: torch {torch.__version__} finds no CUDA device here")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not (name or there or hidden) and (Path("/dev/nvidia0").exists()
                                          or shutil.which("nvidia-smi")):
        print(f"note: this machine has a GPU, but torch {torch.__version__} cannot use it (a wheel "
              "without CUDA, or an old driver): everything runs on the CPU")
    if device.type == "cuda":
        # with a mask its gradients can be NaN (pytorch issue 196678), and it plans every shape anew
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cuda" and world() > 1:
        if local_world() > torch.cuda.device_count():
            raise InputError(f"{local_world()} processes on a machine with "
                             f"{torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """The torch.dtype `name`; without a name, bfloat16 on CUDA, else float32."""
    import torch
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


def open_pretrained(auto_class, path, **kwargs):
    """`auto_class.from_pretrained` without remote code; InputError if `path` is no such folder."""
    from safetensors import SafetensorError
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0]
        raise InputError(f"{path}: not a model folder or hub name ({reason})") from None


def open_model(path, device, auto="AutoModelForCausalLM", load_in_4bit=False, shards=False,
               dtype=None, trains=None, **kwargs):
    """The model of a folder or hub name. A folder of adapters is its base with the adapters added.

    load_in_4bit: linear layers but the head in 4 bits (NF4).
    shards: `core.distributed.shard` will deal the model out. Of several processes only the
        first reads the weights, into main memory; with `shards` they stay there, without it
        every process gets a copy on its device.
    dtype: of the weights; None is `pick_dtype`'s.
    trains: "weights" or "adapters" if these will be trained. With "weights", 16-bit weights carry
        their exact fp32 values (core/precision.py), adapters become part of them, and weights that
        will be sharded are fp32.
    Raises InputError for what is no model, lacks weights, or is larger than the device.
    """
    import torch
    import transformers
    if load_in_4bit and shards and world() > 1:
        raise InputError("--load-in-4bit trains in one process; several shard the weights "
                         "instead, 16 bits each")
    dtype = computed = dtype or pick_dtype(None, device)
    adapters = read_adapters(path)
    if adapters:
        model = open_model(adapters.base, device, auto, load_in_4bit, shards, dtype, trains,
                           **kwargs)
        (merge_adapters if trains == "weights" else put_adapters)(model, adapters)
        return model
    transformers.utils.logging.disable_progress_bar()
    # no warning that the judge's head is new
    transformers.utils.logging.set_verbosity_error()
    auto_class, exact = getattr(transformers, auto), trains == "weights"
    if exact and shards and world() > 1:
        dtype = torch.float32
    empty = refuse_too_large(path, auto_class, dtype, device, load_in_4bit, shards, kwargs)
    model = None
    if rank() == 0:
        model = read_model(path, auto_class, dtype, kwargs)
        add_remainders(model, path, auto_class, exact, kwargs)
    elif empty is None:
        raise InputError(f"{path}: not a model that {auto} opens")
    else:
        model = empty
    if load_in_4bit:
        to_4bit(model, device, dtype)
    if world() == 1:
        model.to(device)
        for p in model.parameters():
            if hasattr(p, "low_bits"):
                p.low_bits = p.low_bits.to(device)
    elif not shards:
        deliver(model, device)
    model.compute_dtype = computed
    return model


def what_trains(args):
    """`trains` of `open_model`, by the flags of a training."""
    return "adapters" if args.lora_rank else "weights"


def refuse_too_large(path, auto_class, dtype, device, load_in_4bit, shards, kwargs):
    """The model without memory for its weights, on the meta device; None if it cannot be made.

    Raises InputError if the weights would be larger than the device, before they are read.
    """
    import torch
    from transformers import AutoConfig
    model, have = None, free_bytes(device)
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


def add_remainders(model, path, auto_class, exact, kwargs):
    """Add what a folder holds beyond 16 bits: to fp32 weights always, to 16-bit ones if `exact`.

    It is in the folder's REMAINDER, or in the weights themselves if these are of another type.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    weights, file = dict(model.named_parameters()), Path(path) / REMAINDER
    if file.exists() and (exact or model.dtype == torch.float32):
        try:
            remainders = load_file(file)
            for name, remainder in remainders.items():
                if (remainder.dtype, remainder.shape) != (torch.int16, weights[name].shape):
                    raise KeyError(name)
                set_exact(weights[name], join(weights[name].to(torch.bfloat16), remainder))
        except (OSError, KeyError, RuntimeError, SafetensorError) as e:
            raise InputError(f"{file}: not the remainders of this model's weights ({e})") from None
    elif exact and model.dtype == torch.bfloat16 and stored_type(path) != "bfloat16":
        full = dict(read_model(path, auto_class, torch.float32, kwargs).named_parameters())
        for name, p in weights.items():
            set_exact(p, full[name].data)
    if exact:
        keep_exact(model)


def stored_type(path):
    """The type of a model's weights on disk, by its config."""
    from transformers import AutoConfig
    return str(open_pretrained(AutoConfig, path).dtype).removeprefix("torch.")


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
    """Write what was trained, with the tokenizer; the first of several processes writes.

    Adapters: the PEFT folder of `core.adapters.write_adapters`, without the base's weights. Else a
    `save_pretrained` folder; what its 16-bit weights lack to fp32 is in the file REMAINDER.
    """
    # with several processes as variables, which shows which of them are tied
    weights = gathered(model.state_dict(keep_vars=world() > 1))
    first(lambda: _save_model(model, tokenizer, folder, weights))


def _save_model(model, tokenizer, folder, weights):
    from safetensors.torch import save_file
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    if any(name.endswith("lora_A") for name in weights):
        write_adapters(model, weights, folder)
        model.generation_config.save_pretrained(folder)     # what ends an answer
        return
    remainders = {name: p.low_bits.cpu() for name, p in model.named_parameters()
                  if hasattr(p, "low_bits")}
    sharded_fp32 = getattr(model, "compute_dtype", model.dtype) != model.dtype
    if sharded_fp32:
        halves = {}
        for name, tensor in weights.items():
            if id(tensor) not in halves:        # else tied to an earlier one
                halves[id(tensor)], remainders[name] = split(tensor.detach())
            weights[name] = halves[id(tensor)]
    model.save_pretrained(folder, state_dict=weights)
    if sharded_fp32:
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", {**config, "dtype": "bfloat16"})
    if remainders:
        (folder / REMAINDER).parent.mkdir(exist_ok=True)
        save_file(remainders, folder / REMAINDER)
