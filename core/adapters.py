"""LoRA adapters: beside every linear layer but the head."""
from pathlib import Path

from core.records import InputError


def inner_linears(model, flag):
    """[(name, layer)] of all linear layers but the head.

    Raises InputError, naming `flag`, if the model has none.
    """
    import torch
    head = model.get_output_embeddings()
    found = [(name, layer) for name, layer in model.named_modules()
             if isinstance(layer, torch.nn.Linear) and layer is not head]
    if not found:
        raise InputError(f"{flag}: the model has no linear layers")
    return found


def add_lora(model, rank):
    """Freeze the model and give every linear layer but the head an adapter, in place.

    y = Wx + 2 BAx (LoRA, arXiv 2106.09685, equation 3, with alpha = 2 rank as in the paper);
    A (rank, in) and B (out, rank) in fp32; B = 0 at the start. A model that was opened with
    adapters keeps them, and they are trained on. Raises InputError if their rank is another one.
    """
    import torch

    class LoraLinear(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, device = base, base.weight.device
            # drawn in main memory, so that the number of processes changes nothing
            a, b = torch.empty(rank, base.in_features), torch.zeros(base.out_features, rank)
            torch.nn.init.kaiming_uniform_(a, a=5 ** 0.5)
            self.lora_A = torch.nn.Parameter(a.to(device))
            self.lora_B = torch.nn.Parameter(b.to(device))

        def forward(self, x):
            a, b = self.lora_A.T.to(x.dtype), self.lora_B.T.to(x.dtype)
            return self.base(x) + 2 * (x @ a) @ b

    present = [p for name, p in model.named_parameters() if name.endswith("lora_A")]
    if present:
        if len(present[0]) != rank:
            raise InputError(f"--lora-rank {rank}: the model has adapters of rank "
                             f"{len(present[0])}")
        return
    model.requires_grad_(False)
    for name, layer in inner_linears(model, "--lora-rank"):
        model.set_submodule(name, LoraLinear(layer))


def read_adapters(folder):
    """The adapters beside a model that `core.models.save_model` wrote; None if there are none.

    {"base": the model that they belong to, parameter name: tensor}. Raises InputError for a
    file that is broken.
    """
    from safetensors import SafetensorError, safe_open
    path = Path(folder) / "adapters.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            return {"base": f.metadata()["base"], **tensors}
    except (OSError, SafetensorError, TypeError, KeyError) as e:
        raise InputError(f"{path}: not adapters that a stage wrote ({e})") from None
