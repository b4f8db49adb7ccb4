"""16 bits compute, 32 bits learn: bf16 weights that also carry what is missing to fp32.

bf16 has 8 significant bits. A weight of 0.02 cannot take a step smaller than 6e-5, so the steps of
finetuning (1e-6 to 1e-5) would be rounded away. Each trained 16-bit parameter `p` therefore has
`p.low_bits`, int16, of its shape. The two bit patterns, joined, are exactly one fp32 value:

    fp32 bits = (bf16 bits << 16) + remainder

The forward pass reads the bf16 weight, which is the nearest one; the optimizer reads and writes the
fp32 value. Who sets such a weight by hand does it with `set_exact`. NVIDIA's Apex
(`store_param_remainders`) and TransformerEngine keep param remainders too; there the bf16 weight is
the truncated one, which is smaller than its value in every weight.
"""


def halves(values):
    """The lower and the upper 16 bits of contiguous fp32 values: int16 views of their shape."""
    import torch
    parts = values.reshape(-1).view(torch.int16).view(*values.shape, 2)
    return parts[..., 0], parts[..., 1]     # every processor that torch runs on is little-endian


def split(values):
    """fp32 -> (nearest bf16, remainder int16), of the same shape.

    Halfway values go away from 0: int16 holds the remainder of a tie on that side only.
    """
    import torch
    low, high = halves(values)
    # read as a signed number, the lower half is the remainder; one below 0 counts from the next
    return (high - (low >> 15)).view(torch.bfloat16), low.contiguous()


def join(weights, remainder):
    """(bf16, remainder int16) -> fp32: the inverse of `split`."""
    import torch
    values = torch.empty(weights.shape, dtype=torch.float32, device=weights.device)
    low, high = halves(values)
    low.copy_(remainder)
    torch.add(weights.view(torch.int16), remainder >> 15, out=high)
    return values


def exact_value(p):
    """The value of a parameter in full: fp32 if it has a remainder, else its own data."""
    return join(p.data, p.low_bits) if hasattr(p, "low_bits") else p.data


def set_exact(p, values):
    """Make `values`, fp32 or of the parameter's type, the value of a parameter.

    What a bf16 parameter cannot hold of fp32 values becomes its remainder.
    """
    import torch
    if p.dtype == torch.bfloat16 and values.dtype == torch.float32:
        weights, remainder = split(values.contiguous())
        p.data.copy_(weights)
        p.low_bits = remainder.to(p.device)
    else:
        p.data.copy_(values)


def exact_in(model, dtype):
    """Hold a model's fp32 weights in `dtype`, exactly."""
    import torch
    for p in model.parameters() if dtype == torch.bfloat16 else ():
        p.data, p.low_bits = split(p.data)


def keep_exact(model):
    """Give each bf16 parameter that has no remainder yet one of 0."""
    import torch
    for p in model.parameters():
        if p.dtype == torch.bfloat16 and not hasattr(p, "low_bits"):
            p.low_bits = torch.zeros(p.shape, dtype=torch.int16, device=p.device)


def exact_step(optimizer, scale):
    """One step of an optimizer in fp32, with gradients times `scale`, which are then cleared.

    One parameter at a time, so that only one is in memory in fp32: optimizers leave out those
    without a gradient.
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = []
    for p in params:
        gradients.append(p.grad)
        p.grad = None
    for p in reversed(params):
        weights = p.data
        p.data = values = exact_value(p)
        p.grad = gradients.pop().float() * scale
        optimizer.step()
        p.data, p.grad = weights, None
        set_exact(p, values)
