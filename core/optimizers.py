"""Optimizers, the learning-rate schedule, and one optimizer step."""
import math

from core.distributed import full, world
from core.precision import exact_step
from core.records import InputError


def cosine_lr(step, total, warmup):
    """Share of the peak learning rate at `step` (counted from 0) of `total` steps.

    Linear warm-up over the share `warmup` of the run, then cosine to 0.
    """
    ramp = max(1, round(total * warmup))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


def orthogonal(matrix, dtype):
    """A matrix (m, n) with its singular values moved to about 1: 0.7 to 1.2, the small ones less.

    Five steps of Newton-Schulz, computed in `dtype`, with the coefficients of Muon (Jordan et al.
    2024, github.com/KellerJordan/Muon).
    """
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = x.addmm(gram.addmm(gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x


def make_muon(params, lr):
    """Muon for matrices, without weight decay: Nesterov momentum 0.95, then `orthogonal`.

    The root mean square of an update is 0.2 lr, about that of AdamW (arXiv 2502.16982, equation 4).
    torch.optim.Muon, whose step this is, computes in bf16 on every device; here a CPU computes in
    fp32, because most have no bf16 units and take several times as long without them.
    """
    import torch

    class Muon(torch.optim.Muon):
        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p.grad)
                    momentum = state["momentum_buffer"].lerp_(p.grad, 1 - 0.95)
                    dtype = torch.bfloat16 if p.is_cuda else torch.float32
                    update = orthogonal(p.grad.lerp(momentum, 0.95), dtype)
                    p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))
    return Muon(params, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def make_optimizers(model, name, lr, device):
    """The optimizers that `name` stands for, as a list. Muon needs a second one for non-matrices.

    auto: 8-bit AdamW on CUDA; fused AdamW on a CPU, where 8 bits cost time and save little, and
    with several processes, because bitsandbytes cannot read sharded tensors. No weight decay.
    8-bit optimizers keep 32-bit state for embeddings, as their authors advise.
    Raises InputError for an 8-bit optimizer with several processes.
    """
    import torch
    if name == "auto":
        name = "adamw8bit" if device.type == "cuda" and world() == 1 else "adamw"
    if world() > 1 and name.endswith("8bit"):
        raise InputError(f"--optimizer {name}: 8-bit optimizers cannot read the sharded tensors "
                         f"of several processes; {name.removesuffix('8bit')} keeps its state in "
                         "the weights' type")
    params = [p for p in model.parameters() if p.requires_grad]
    exact = " with remainders to fp32" if hasattr(params[0], "low_bits") else ""
    print(f"optimizer: {name}, lr {lr:g}, {sum(p.numel() for p in params):,} weights in "
          f"{params[0].dtype}{exact} on {device}"
          + (f", sharded over {world()} processes" if world() > 1 else ""))
    adamw = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.0}
    first = []
    if name == "muon":
        inner = {id(p) for n, p in model.named_parameters()
                 if p.ndim == 2 and "embed" not in n and "lm_head" not in n}
        first = [make_muon([p for p in params if id(p) in inner], lr)]
        params = [p for p in params if id(p) not in inner]
    if name in ("adamw", "muon"):
        return first + ([torch.optim.AdamW(params, fused=True, **adamw)] if params else [])
    if name == "rmsprop":
        return [torch.optim.RMSprop(params, lr=lr)]
    import bitsandbytes as bnb
    bnb.optim.GlobalOptimManager.get_instance().register_module_override(
        model.get_input_embeddings(), "weight", {"optim_bits": 32})
    if name == "rmsprop8bit":
        return [bnb.optim.RMSprop8bit(params, lr=lr)]
    return [bnb.optim.AdamW8bit(params, **adamw)]


def restore(optimizer, saved):
    """`optimizer.load_state_dict(saved)`, every tensor in the type in which it was saved.

    torch casts states to the type of the parameters; those of 16-bit ones are fp32.
    """
    import torch
    optimizer.load_state_dict(saved)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in saved["state"].items():
        state = optimizer.state[params[i]]
        for key, value in values.items():
            if torch.is_tensor(value) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)


def apply_gradients(model, optimizers, lr, max_norm=1.0):
    """Clip by the global norm, set the learning rate, step, clear the gradients.

    What has remainders (core/precision.py) is updated in fp32. Returns the norm before clipping.
    Raises FloatingPointError if it is not finite.
    """
    import torch
    params = [p for p in model.parameters() if p.grad is not None]
    exact = any(hasattr(p, "low_bits") for p in params)
    if exact:       # 16-bit gradients: their norm in fp32, and clipped as they become fp32
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in params]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    else:
        norm = full(torch.nn.utils.clip_grad_norm_(params, max_norm))
    norm = norm.item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}: lower --lr, or look for broken "
                                 "records in the data")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if exact:
            exact_step(optimizer, scale)
        else:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return norm
