"""Memory of a training: what it will need against what the device has, and what to do when that was not enough."""
import contextlib
import gc
import os
from pathlib import Path

from tasks import InputError
from tasks._parallel import layers_of, local_world, world


def device_bytes(device):
    """What this process may use of a device: of a GPU's memory what is free or its own, else this machine's or container's."""
    import torch
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (min(installed, int(text)) if text.isdigit() else installed) // local_world()


def activation_bytes(config, size, tokens, row_tokens, labelled, checkpointing):
    """What autograd keeps of one micro-batch of `tokens` tokens in rows of `row_tokens`, in bytes.

    size: bytes of a value; labelled: share of the tokens whose logits are computed. A Llama-like layer keeps about
    10 h + 6 a + 4 i values a token (norms; queries to attention output; the gated MLP) and a row of the attention mask: within
    a quarter of what autograd really keeps under sdpa (tests/test_memory.py). A checkpointed layer keeps at most twice its
    input, and one at a time keeps all of that. The head keeps logits in the model's type and, in fp32, a copy and two gradients.
    """
    h, heads = config.hidden_size, getattr(config, "num_attention_heads", None) or 1
    a = heads * (getattr(config, "head_dim", None) or h // heads)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * h
    layer, layers = size * tokens * (10 * h + 6 * a + 4 * inner + row_tokens), config.num_hidden_layers
    kept = (2 * layers + 4) * size * tokens * h + layer if checkpointing else layers * layer
    return kept + round(tokens * labelled * config.vocab_size * (size + 12))


def check_memory(model, optimizers, args, device, labelled):
    """Print what training needs against what the device has, in GB; of several processes, each one's share, and what is gathered while
    a layer computes. Raises InputError where that cannot fit, naming the first flag that would make it fit, cheapest first.
    labelled: share of the tokens whose logits are computed."""
    size, tokens, row = model.dtype.itemsize, max(args.micro_tokens, args.row_tokens), args.row_tokens
    embedding, params = model.get_input_embeddings().weight, list(model.parameters())

    def state(optimizer, p):       # bytes; embeddings keep 32-bit state
        kind = type(optimizer).__name__
        each = {"AdamW": 2 * p.element_size(), "Muon": p.element_size(), "RMSprop": p.element_size(), "AdamW8bit": 2, "RMSprop8bit": 1}[kind]
        return p.numel() * each * (4 if p is embedding and kind.endswith("8bit") else 1)

    def size_of(params, trained=False):
        return sum(p.numel() * p.element_size() for p in params if p.requires_grad or not trained)
    weights, gradients = size_of(params) / world(), size_of(params, True) / world()
    optimizer = sum(state(o, p) for o in optimizers for group in o.param_groups for p in group["params"]) / world()
    adapters = sum(14 * 64 * (m.in_features + m.out_features) for m in model.modules() if hasattr(m, "in_features")) / world()
    gathered = 0
    if world() > 1:     # two layers, for the next is fetched meanwhile, the gradients of one, and what is in no layer, embeddings and head
        layers = [list(layer.parameters()) for layer in layers_of(model)] or [[]]
        gathered = 2 * max(map(size_of, layers)) + max(size_of(layer, True) for layer in layers) + size_of(params) - sum(map(size_of, layers))

    def activations(n=tokens, checkpointing=args.gradient_checkpointing):
        return activation_bytes(model.config.get_text_config(), size, n, min(n, row), labelled, checkpointing)
    fixed, have = weights + gradients + optimizer + gathered, device_bytes(device)
    ways = [("--gradient-checkpointing", fixed + activations(checkpointing=True)),
            *((f"--gradient-checkpointing --row-tokens {min(n, row)} --micro-tokens {n}", fixed + activations(n, True)) for n in (2048, 1024, 512))]
    if hasattr(args, "lora_rank"):
        ways.append(("--gradient-checkpointing --lora-rank 64", weights + gathered + adapters + activations(checkpointing=True)))
        if world() == 1:
            ways.append(("--gradient-checkpointing --lora-rank 64 --load-in-4bit", weights * 0.6 / size + adapters + activations(checkpointing=True)))
    need = fixed + activations()
    line = (f"memory: weights {weights / 1e9:.3g} + gradients {gradients / 1e9:.3g} + optimizer {optimizer / 1e9:.3g} + activations "
            f"{activations() / 1e9:.3g}" + (f" + gathered {gathered / 1e9:.3g}" if gathered else "") + f" = {need / 1e9:.3g} of {have / 1e9:.3g} GB"
            + (f" in each of {world()} processes" if world() > 1 else ""))
    if need > have:
        way = next((flag for flag, other in ways if other <= have), "none of this stage's flags" if world() == 1 else "no flag, but more processes")
        raise InputError(f"{line}: {way} would make it fit")
    print(line)


def lacks_memory(error):
    """torch.OutOfMemoryError on a GPU; on the CPU the error has no name of its own."""
    return any(s in str(error) for s in ("out of memory", "can't allocate memory"))


def attempts(model, args):
    """Tries at one optimizer batch. `for attempt in attempts(model, args): with attempt: ...` does its body again with half the
    --micro-tokens whenever memory runs out; the batch is the same, and so is its gradient. The body begins with letting go of its
    tensors: what a failed try has computed would be in the way of the next."""
    import torch
    done = []

    @contextlib.contextmanager
    def attempt():
        try:
            yield
            done.append(True)
        except RuntimeError as e:
            tokens = max(args.micro_tokens, args.row_tokens) // 2
            if not lacks_memory(e) or tokens < 64 or world() > 1:      # one of several cannot do its passes again alone
                raise
            args.micro_tokens, args.row_tokens = tokens, min(args.row_tokens, tokens)
            print(f"out of memory: going on with --micro-tokens {tokens}")
    while not done:
        yield attempt()
        if not done:        # out here the error is gone, and with it the frames that it held
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
