"""Memory: what a device has, whether a training fits it, what to do if it does not."""
import contextlib
import gc
import os
from pathlib import Path

from core.distributed import local_world, world
from core.needs import (
    NF4,
    activation_bytes,
    compute_size,
    plan,
    row_bytes,
    rows_that_fit,
    size_of,
    state_bytes,
)
from core.packing import labelled_share
from core.records import InputError


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


def free_bytes(device):
    """`device_bytes` without what this process's tensors hold of a GPU."""
    import torch
    used = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return device_bytes(device) - used


def check_memory(model, optimizers, args, device, sequences, group=1):
    """Print what training needs and what the device has, in GB; per process if there are several.

    args: of the stage; sequences and group as in `core.packing.pack`. Raises InputError if it
    cannot fit; the message names the first flag that would make it fit, cheapest first.
    """
    labelled, longest = labelled_share(sequences, model, group), max(len(s[0]) for s in sequences)
    embedding, have = model.get_input_embeddings().weight, device_bytes(device)
    state = sum(state_bytes(type(o).__name__, part["params"], embedding)
                for o in optimizers for part in o.param_groups)
    needs = plan(model, state, args, labelled, longest, group)
    line = f"memory: {needs} = {needs.total() / 1e9:.3g} of {have / 1e9:.3g} GB"
    line += f" in each of {world()} processes" if world() > 1 else ""
    if needs.total() <= have:
        print(line)
        return

    def activations(n):
        return activation_bytes(model, max(n, group * longest), longest, labelled, True)
    checkpoint, least = "--gradient-checkpointing", activations(args.micro_tokens)
    ways = [(checkpoint, needs._replace(activations=least).total())]     # (flags, bytes with them)
    ways += [(f"{checkpoint} --micro-tokens {n}",
              needs._replace(activations=activations(n)).total()) for n in (2048, 1024, 512)]
    if hasattr(args, "lora_rank"):
        # on every linear layer; of each weight of an adapter itself, gradient and state in fp32
        linears = [m for m in model.modules() if hasattr(m, "in_features")]
        least += needs.gathered + sum(16 * 64 * (m.in_features + m.out_features)
                                      for m in linears) / world()
        inner = sum(m.in_features * m.out_features for m in linears)
        size, count = compute_size(model), sum(p.numel() for p in model.parameters())
        lora = f"{checkpoint} --lora-rank 64"
        ways.append((lora, least + size * count / world()))
        if world() == 1:
            ways.append((f"{lora} --load-in-4bit", least + size * (count - inner) + NF4 * inner))
    nothing = "none of this stage's flags" if world() == 1 else "no flag, but more processes"
    way = next((flags for flags, other in ways if other <= have), nothing)
    raise InputError(f"{line}: {way} would make it fit")


def decoding_rows(model, prompt_tokens, new_tokens, beams, device):
    """How many prompts fit the device's memory beside what is there already; at least 1.

    prompt_tokens: of the longest one; new_tokens: the most that are generated.
    """
    have = free_bytes(device) - (size_of(model.parameters()) if device.type != "cuda" else 0)
    row = row_bytes(model.config.get_text_config(), compute_size(model), prompt_tokens, new_tokens,
                    beams)
    return rows_that_fit(have, row, beams)


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
            tokens = args.micro_tokens // 2
            # one of several processes cannot repeat its passes alone
            if not lacks_memory(e) or tokens < 64 or world() > 1:
                raise
            args.micro_tokens = tokens
            print(f"out of memory: going on with --micro-tokens {tokens}")
    while not done:
        yield attempt()
        if not done:        # the exception, whose frames hold tensors, is deleted by now
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
