"""LoRA adapters, beside every linear layer but the head, and their folders in PEFT's format.

A folder of adapters names its base by hub name, or by the path from the folder, and holds a digest
of the base's weights: moved together they work, another model in the base's place is refused.
"""
import functools
import hashlib
import json
import math
import os
from collections import namedtuple
from pathlib import Path

from core.precision import exact_value, set_exact
from core.records import InputError, write_json
from core.sources import ADAPTER_CONFIG, fingerprint

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."        # PEFT's, before the names of the model's own layers


class Adapters(namedtuple("Adapters", "folder base digest alpha tensors")):
    """What a folder holds: path or hub name of its base, a digest of the base's weights or None,
    alpha, and {parameter name: fp32 tensor}: LAYER.lora_A (rank, in), LAYER.lora_B (out, rank)."""


def inner_linears(model, flag):
    """[(name, layer)] of all linear layers but the head; says what share of the weights they are.

    Raises InputError, naming `flag`, if the model has none.
    """
    import torch
    head = model.get_output_embeddings()
    found = [(name, layer) for name, layer in model.named_modules()
             if isinstance(layer, torch.nn.Linear) and layer is not head]
    if not found:
        raise InputError(f"{flag}: the model has no linear layers (torch.nn.Linear)")
    covered = {id(layer.weight) for _, layer in found}
    covered |= {id(model.get_input_embeddings().weight), id(getattr(head, "weight", None))}
    other = {name: p.numel() for name, p in model.named_parameters()
             if p.ndim > 1 and id(p) not in covered}
    inner = sum(layer.weight.numel() for _, layer in found)
    print(f"{flag}: {len(found)} linear layers, {inner / (inner + sum(other.values())):.1%} of the "
          "weights between embeddings and head"
          + (f"; not {len(other)} others, as {max(other, key=other.get)}" if other else ""))
    return found


@functools.cache
def lora_linear():
    import torch

    class LoraLinear(torch.nn.Module):
        """y = Wx + alpha / rank BAx (LoRA, arXiv 2106.09685, equation 3); W stays as it is."""

        def __init__(self, base, a, b, alpha):
            super().__init__()
            self.base, self.alpha, self.scale = base, alpha, alpha / len(a)
            device = base.weight.device
            self.lora_A = torch.nn.Parameter(a.to(device))
            self.lora_B = torch.nn.Parameter(b.to(device))

        def forward(self, x):
            a, b = self.lora_A.T.to(x.dtype), self.lora_B.T.to(x.dtype)
            return self.base(x) + self.scale * (x @ a) @ b
    return LoraLinear


def add_lora(model, rank):
    """Freeze the model and give every linear layer but the head an adapter, in place.

    alpha = 2 rank as in the paper; A (rank, in) and B (out, rank) in fp32; B = 0 at
    the start. A model that was opened with adapters keeps them, and they are trained on. Raises
    InputError if their rank is another one.
    """
    import torch
    present = [p for name, p in model.named_parameters() if name.endswith("lora_A")]
    if present:
        if len(present[0]) != rank:
            raise InputError(f"--lora-rank {rank}: the model has adapters of rank "
                             f"{len(present[0])}")
        return
    model.requires_grad_(False)
    for name, layer in inner_linears(model, f"--lora-rank {rank}"):
        # drawn in main memory, so that the number of processes changes nothing
        a = torch.empty(rank, layer.in_features)
        b = torch.zeros(layer.out_features, rank)
        torch.nn.init.kaiming_uniform_(a, a=5 ** 0.5)
        model.set_submodule(name, lora_linear()(layer, a, b, 2 * rank))


# ---------------------------------------------------------------- a folder's adapters
def put_adapters(model, adapters):
    """Freeze the model and add a folder's adapters to it, to be read or trained on."""
    model.requires_grad_(False)
    for name, layer, a, b in matched(model, adapters):
        model.set_submodule(name, lora_linear()(layer, a, b, adapters.alpha))


def merge_adapters(model, adapters):
    """Make W + alpha / rank BA the layers' weights: exactly, if they carry remainders.

    Returns how much of the change the weights themselves show, a projection: 1 in fp32, less where
    16 bits round. Weights that another process holds are left as they are.
    """
    kept = wanted = 0.0
    for _, layer, a, b in matched(model, adapters):
        p = layer.weight
        if not p.is_meta:
            change = adapters.alpha / len(a) * (b.to(p.device) @ a.to(p.device))
            before = exact_value(p).float().clone()     # fp32 weights change in place
            set_exact(p, before + change)
            kept += ((p.data.float() - before) * change).sum().item()
            wanted += (change * change).sum().item()
    return kept / (wanted or 1)


def matched(model, adapters):
    """(layer's name, layer, A, B) of each of a folder's adapters.

    Raises InputError if the model has no such layer, or is another one than the adapters' base.
    """
    if adapters.digest and adapters.digest != weights_digest(adapters.base):
        raise InputError(f"{adapters.folder}: made for other weights than {adapters.base} has now")
    layers, t = dict(model.named_modules()), adapters.tensors
    for name in [key.removesuffix(".lora_A") for key in t if key.endswith("lora_A")]:
        a, b = t[f"{name}.lora_A"], t[f"{name}.lora_B"]
        if name not in layers:      # of a model without a head
            name = name.removeprefix(f"{model.base_model_prefix}.")
        layer = layers.get(name)
        shape = getattr(layer, "out_features", 0), getattr(layer, "in_features", 0)
        if (b.shape[0], a.shape[1]) != shape:
            raise InputError(f"{adapters.folder}: {adapters.base} has no linear layer {name} of "
                             f"shape {(b.shape[0], a.shape[1])}")
        yield name, layer, a, b


def write_adapters(model, weights, folder):
    """Write a model's adapters, from its state dict `weights`, as PEFT reads them."""
    from safetensors.torch import save_file
    layers = [name for name, _ in model.named_modules()]
    names = [name for name in layers if f"{name}.lora_A" in weights]
    tensors = {f"{PREFIX}{name}.lora_{x}.weight": weights[f"{name}.lora_{x}"].detach().cpu()
               for name in names for x in "AB"}
    # PEFT takes the ends of names, unless layers without adapters have them too
    ends = {name.rpartition(".")[2] for name in names}
    clear = {name for name in layers if name.rpartition(".")[2] in ends} == set(names)
    base = str(model.name_or_path)
    write_json(Path(folder) / ADAPTER_CONFIG, {
        "base_model_name_or_path": from_folder(base, folder), "peft_type": "LORA",
        "task_type": "CAUSAL_LM", "r": len(weights[f"{names[0]}.lora_A"]),
        "lora_alpha": round(model.get_submodule(names[0]).alpha),
        "target_modules": sorted(ends if clear else names), "lora_dropout": 0.0, "bias": "none",
        "inference_mode": True})
    # of two entries, safetensors would write either first
    save_file(tensors, Path(folder) / WEIGHTS, {"base_digest": weights_digest(base)})


def from_folder(base, folder):
    """A base as a folder of adapters names it: a path from the folder, or a hub name."""
    return os.path.relpath(os.path.realpath(base), os.path.realpath(folder)) if Path(
        base).exists() else base


def read_adapters(folder):
    """The Adapters of a folder that a stage or PEFT wrote; None if it holds none.

    Raises InputError for what is broken, is more than LoRA on linear layers, or lacks its base.
    """
    from safetensors import SafetensorError, safe_open
    path = Path(folder) / ADAPTER_CONFIG
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, alpha = config["base_model_name_or_path"], float(config["lora_alpha"])
        with safe_open(path.with_name(WEIGHTS), "pt") as f:
            tensors = {name.removeprefix(PREFIX).removesuffix(".weight"): f.get_tensor(name).float()
                       for name in f.keys()}
            digest = (f.metadata() or {}).get("base_digest")
        ranks = {(len(t.shape), t.shape[name.endswith("B")]) for name, t in tensors.items()}
        if not isinstance(base, str) or not 0 < alpha < math.inf or [n for n, _ in ranks] != [2]:
            raise ValueError("a base, an alpha and pairs of matrices of one rank are needed")
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as e:
        raise InputError(f"{folder}: not adapters as a stage or PEFT writes them ({e})") from None
    more = [k for k in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
                        "modules_to_save") if config.get(k)]
    more += [k for k in tensors if not k.endswith((".lora_A", ".lora_B"))
             or k[:-1] + ("B" if k.endswith("A") else "A") not in tensors]
    if config.get("peft_type") != "LORA" or more:
        raise InputError(f"{folder}: adapters of a kind that is not read here "
                         f"({', '.join([str(config.get('peft_type')), *more[:2]])})")
    here = os.path.normpath(os.path.join(os.path.realpath(folder), base))
    if os.path.exists(here):
        base = here
        if (Path(base) / ADAPTER_CONFIG).exists():
            raise InputError(f"{folder}: its base, {base}, is a folder of adapters too")
    elif base.startswith((".", "/")):
        raise InputError(f"{folder}: its base, {here}, is not there: move it along, or name it in "
                         f"{ADAPTER_CONFIG} as base_model_name_or_path")
    return Adapters(folder, base, digest, alpha, tensors)


def weights_digest(model):
    """12 hex digits that tell the weights of a folder or hub name (`fingerprint` of each file)."""
    from transformers.utils import cached_file
    folder = Path(model) if Path(model).is_dir() else Path(cached_file(model, "config.json")).parent
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256("".join(map(fingerprint, files)).encode()).hexdigest()[:12]


def carry_over(old, new, run):
    """Copy a folder's ADAPTER_CONFIG from the run folder `run` to another place: what it names
    outside of that run is the same model as before."""
    config = json.loads(Path(old).read_text(encoding="utf-8"))
    base = os.path.normpath(os.path.join(os.path.realpath(Path(old).parent),
                                         config["base_model_name_or_path"]))
    if os.path.exists(base) and not Path(base).is_relative_to(os.path.realpath(run)):
        config["base_model_name_or_path"] = from_folder(base, Path(new).parent)
    write_json(new, config)
