"""Memory of a training: how much it needs, whether the device has it, what to do if it had not."""
import contextlib
import gc
import os
from pathlib import Path

from core.distributed import layers_of, local_world, world
from core.records import InputError

STATE_BYTES = {"AdamW8bit": 2, "RMSprop8bit": 1}     # of a weight
STATE_VALUES = {"AdamW": 2, "Muon": 1, "RMSprop": 1}     # of a weight, in the weight's own type


def device_bytes(device):
    """Bytes that this process may use of a device.

    GPU: what is free and what this process has reserved. CPU: this process's part of the memory of
    the machine, or of the container if it has a limit.
    """
    import torch
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (min(installed, int(text)) if text.isdigit() else installed) // local_world()


def activation_bytes(config, size, tokens, row_tokens, labelled, checkpointing):
    """Bytes that autograd keeps of one micro-batch of `tokens` tokens in rows of `row_tokens`.

    size: bytes per value; labelled: share of the tokens whose logits are computed.

    Per token, a Llama-like layer keeps about 10 h + 6 a + 4 i values (norms; queries to attention
    output; the gated MLP) and one row of the attention mask. This is within a quarter of what
    autograd really keeps under sdpa (tests/test_memory.py). A checkpointed layer keeps at most
    twice its input; one layer at a time keeps everything. The head keeps logits in the model's type
    and, in fp32, one copy and two gradients.
    """
    h, layers = config.hidden_size, config.num_hidden_layers
    heads = getattr(config, "num_attention_heads", None) or 1
    a = heads * (getattr(config, "head_dim", None) or h // heads)
    inner = (getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
             or 4 * h)
    layer = size * tokens * (10 * h + 6 * a + 4 * inner + row_tokens)
    kept = (2 * layers + 4) * size * tokens * h + layer if checkpointing else layers * layer
    return kept + round(tokens * labelled * config.vocab_size * (size + 12))


def size_of(params, trained=False):
    """Bytes of some parameters; with `trained`, of those that are trained."""
    return sum(p.numel() * p.element_size() for p in params if p.requires_grad or not trained)


def state_bytes(optimizers, embedding):
    """Bytes of the optimizers' state, which 8-bit optimizers keep in 32 bits for the embedding."""
    total = 0
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if kind in STATE_BYTES:
                total += p.numel() * STATE_BYTES[kind] * (4 if p is embedding else 1)
            else:
                total += p.numel() * STATE_VALUES[kind] * p.element_size()
    return total


def gathered_bytes(model):
    """Bytes of what is gathered while a layer of a sharded model computes; 0 for one process.

    Two layers, because the next one is fetched meanwhile; the gradients of one; and the parameters
    outside of the layers, embeddings and head.
    """
    if world() == 1:
        return 0
    layers = [list(layer.parameters()) for layer in layers_of(model)] or [[]]
    outside = size_of(model.parameters()) - sum(map(size_of, layers))
    return 2 * max(map(size_of, layers)) + max(size_of(layer, True) for layer in layers) + outside


def check_memory(model, optimizers, args, device, labelled):
    """Print what training needs and what the device has, in GB; per process if there are several.

    labelled: share of the tokens whose logits are computed. Raises InputError if it cannot fit; the
    message names the first flag that would make it fit, cheapest first.
    """
    size, row = model.dtype.itemsize, args.row_tokens
    tokens, params = max(args.micro_tokens, row), list(model.parameters())
    config = model.config.get_text_config()

    def activations(n=tokens, checkpointing=args.gradient_checkpointing):
        return activation_bytes(config, size, n, min(n, row), labelled, checkpointing)
    weights, gradients = size_of(params) / world(), size_of(params, True) / world()
    optimizer = state_bytes(optimizers, model.get_input_embeddings().weight) / world()
    gathered = gathered_bytes(model)
    fixed, have = weights + gradients + optimizer + gathered, device_bytes(device)
    need = fixed + activations()
    line = (f"memory: weights {weights / 1e9:.3g} + gradients {gradients / 1e9:.3g}"
            f" + optimizer {optimizer / 1e9:.3g} + activations {activations() / 1e9:.3g}")
    line += f" + gathered {gathered / 1e9:.3g}" if gathered else ""
    line += f" = {need / 1e9:.3g} of {have / 1e9:.3g} GB"
    line += f" in each of {world()} processes" if world() > 1 else ""
    if need <= have:
        print(line)
        return

    checkpoint, least = "--gradient-checkpointing", activations(checkpointing=True)
    ways = [(checkpoint, fixed + least)]       # (flags, bytes needed with them)
    for n in (2048, 1024, 512):
        flags = f"{checkpoint} --row-tokens {min(n, row)} --micro-tokens {n}"
        ways.append((flags, fixed + activations(n, True)))
    if hasattr(args, "lora_rank"):
        # rank 64 on every linear layer: 14 bytes for each weight of the adapters
        linears = [m for m in model.modules() if hasattr(m, "in_features")]
        adapters = sum(14 * 64 * (m.in_features + m.out_features) for m in linears) / world()
        lora = f"{checkpoint} --lora-rank 64"
        ways.append((lora, weights + gathered + adapters + least))
        if world() == 1:
            ways.append((f"{lora} --load-in-4bit", weights * 0.6 / size + adapters + least))
    nothing = "none of this stage's flags" if world() == 1 else "no flag, but more processes"
    way = next((flags for flags, other in ways if other <= have), nothing)
    raise InputError(f"{line}: {way} would make it fit")


def lacks_memory(error):
    """Whether an error says that memory ran out. On the CPU it has no class of its own."""
    return any(s in str(error) for s in ("out of memory", "can't allocate memory"))


def attempts(model, args):
    """Tries at one optimizer batch: `for attempt in attempts(model, args): with attempt: ...`.

    When memory runs out, the body runs again with half of args.micro_tokens. The batch is the same,
    and so is its gradient. The body must begin by deleting its tensors, or those of the failed try
    stay in memory during the next.
    """
    import torch
    done = []

    @contextlib.contextmanager
    def attempt():
        try:
            yield
            done.append(True)
        except RuntimeError as e:
            tokens = max(args.micro_tokens, args.row_tokens) // 2
            # one of several processes cannot repeat its passes alone
            if not lacks_memory(e) or tokens < 64 or world() > 1:
                raise
            args.micro_tokens, args.row_tokens = tokens, min(args.row_tokens, tokens)
            print(f"out of memory: going on with --micro-tokens {tokens}")
    while not done:
        yield attempt()
        if not done:        # the exception, whose frames hold tensors, is deleted by now
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
