"""Several processes, started by torchrun: who does what, and where the weights lie. Without torchrun nothing here does anything.

    torchrun --nproc-per-node 8 sft.py ...            one process a GPU; all of them see the same files

Training shards weights, gradients and optimizer state over all processes (PyTorch's FSDP2). Sampling and judging keep the model whole
on each device and deal out the batches. Only the first process writes files and speaks.
"""
import contextlib
import datetime
import functools
import gc
import os
import signal
import sys
import threading
import time


def world():
    """Number of processes of this run."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank():
    """Which of them this is; 0 is the first."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def local_world():
    """How many of them are on this machine and share its main memory."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world() > 1 else 1


@contextlib.contextmanager
def processes(prog):
    """Joins the processes of a run and silences all but the first. One that is ended because another has failed says so."""
    if world() == 1:
        yield
        return
    if rank():
        sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def ended():        # a thread, because the main one may hang in a collective where no handler runs
        signal.sigwait({signal.SIGTERM})
        lost(prog) if not failing else leave(1)
    threading.Thread(target=ended, daemon=True).start()
    import torch
    import torch.distributed as dist
    # a process that dies is seen by torchrun at once; the limit must outlast the reading and writing of the largest model
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=2))
    yield
    first(lambda: None)     # all are done
    dist.destroy_process_group()
    leave(0)


def leave(code):
    """Ends one of several processes at once: an orderly end of the interpreter aborts now and then, in threads of gloo's. Bad input
    is bad for all of them: the first, which has said so, leaves them a moment to find out."""
    if world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(code == 2 and rank() == 0)
        os._exit(code)


def lost(prog, words=""):
    """words: what the failed collective says, for it may be the cause itself: a network that no process reaches is nobody's end."""
    if rank() < 2:      # one of these is still there to say it
        print(f"{prog}: error: process {rank()} of {world()}: another process has failed; once its cause is mended the same command, with any "
              "number of processes, continues from what was saved" + (f" ({words})" if words else ""), file=sys.stderr)
    leave(1)


failing = []


def give_way():
    """Before an error is shown: the first process shows those that all have, and torchrun then ends the others."""
    if rank():
        failing.append(True)
        time.sleep(5)


def is_loss_of_another(error):
    """Whether a collective failed because a process is gone: gloo's and NCCL's words for it."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Connection refused", "gloo")
    return world() > 1 and isinstance(error, RuntimeError) and any(w in str(error) for w in words)


# ---------------------------------------------------------------- who does what
def first(function):
    """function(), done by the first process alone; all get its value (a picklable object) or its exception."""
    if world() == 1:
        return function()
    import torch.distributed as dist
    said = [None, None]
    if rank() == 0:
        try:
            said[0] = function()
        except Exception as e:
            said[1] = e
    dist.broadcast_object_list(said, 0)
    if said[1] is not None:
        raise said[1]
    return said[0]


def deal(items, work, idle=None):
    """Yields work(item) of each item, in order, to all processes: of W processes each does every W-th. The results must be picklable.

    Where `work` itself needs all processes, `idle` is an item for those that have none left.
    """
    if world() == 1:
        yield from map(work, items)
        return
    import torch.distributed as dist
    for start in range(0, len(items), world()):
        own = start + rank()
        item, results = items[own] if own < len(items) else idle, [None] * world()
        dist.all_gather_object(results, None if item is None else work(item))
        yield from results[:len(items) - start]


def is_sharded(model):
    return getattr(model, "within_forward", None) is not None


def own_share(items, model):
    """What of `items`, sorted by cost, this process takes of a batch that a sharded model's processes share: dealt out there and back,
    so that all get about the same."""
    if not is_sharded(model):
        return items
    n, me = world(), rank()
    return [x for i, x in enumerate(items) if (i % n if i // n % 2 == 0 else n - 1 - i % n) == me]


def most(count, model):
    """The largest `count` of the processes of a sharded model, each of which must make as many passes as the others."""
    if not is_sharded(model):
        return count
    import torch
    import torch.distributed as dist
    count = torch.tensor(count)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return count.item()


def summed(value, model):
    """A float (added in float64), or a tensor, added up over a sharded model's processes."""
    if not is_sharded(model):
        return value
    import torch
    import torch.distributed as dist
    total = value.clone() if torch.is_tensor(value) else torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total if torch.is_tensor(value) else total.item()


# ---------------------------------------------------------------- where the weights lie
def home(device):
    """Where a process holds a new model before it is dealt out: the first in main memory, the others nowhere."""
    import torch
    return device if world() == 1 else torch.device("cpu" if rank() == 0 else "meta")


def deliver(part, device):
    """Bring all weights and buffers of a model, or a part of one, from the first process to everyone's device, but those that are
    sharded or in 4 bits already. Tied ones stay tied, as they are on the first. One process: nothing happens."""
    if world() == 1:
        return
    import torch
    import torch.distributed as dist

    def tensors():
        for name, module in part.named_modules():
            for key, value in {**vars(module), **module._parameters, **module._buffers}.items():
                if torch.is_tensor(value) and not hasattr(value, "full_tensor") and not hasattr(value, "quant_state"):
                    yield name, key, value

    def plan():        # [(places, shape, dtype, whether it is trained)]
        found = {}
        for name, key, value in tensors():
            found.setdefault(id(value), [[], tuple(value.shape), value.dtype, value.requires_grad])[0].append((name, key))
        return list(found.values())
    for places, shape, dtype, trained in first(plan):
        old = getattr(part.get_submodule(places[0][0]), places[0][1])
        new = old.detach().to(device) if rank() == 0 else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(new, 0)
        new = torch.nn.Parameter(new, requires_grad=trained) if isinstance(old, torch.nn.Parameter) else new
        for name, key in places:
            setattr(part.get_submodule(name), key, new)


def inside_forward(function):
    """Makes of function(model, batch) a forward pass of the whole model: only inside one are a sharded model's weights gathered."""
    @functools.wraps(function)
    def call(model, batch):
        return model.within_forward(function, batch) if is_sharded(model) else function(model, batch)
    return call


def layers_of(model):
    """The model's decoder layers: the outermost list of as many modules as its config says."""
    import torch
    count = model.config.get_text_config().num_hidden_layers
    return next((list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count), [])


def shard(model, device):
    """Deal a model that `open_model(..., shards=True)` opened out over all processes, in place: fully_shard on every layer and on what
    is left (embeddings, head). No process ever holds more than its share and what is gathered of one layer or two. Gradients are
    added up, not averaged: the loss is divided by the whole batch's weight already. One process: nothing happens."""
    if world() == 1:
        return
    gc.collect()        # a sharded model before this one refers to itself
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (world(),))
    for unit in [*layers_of(model), model]:
        deliver(unit, device)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)        # gloo has no other
    model.within_forward = lambda function, batch: function(model, batch)
    register_fsdp_forward_method(model, "within_forward")


def full(tensor):
    """A tensor, put together from all processes if it is sharded."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(values, seen=None):
    """A dict or list of (dicts of) tensors with the sharded ones put together, one after the other, in the first process's main memory
    (None in the others). One process: as they are."""
    if world() == 1:
        return values
    seen = {} if seen is None else seen        # tied tensors stay one
    if isinstance(values, dict):
        return {key: gathered(value, seen) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(gathered(value, seen) for value in values)
    if not hasattr(values, "full_tensor"):
        return values
    if id(values) not in seen:
        tensor = full(values)
        seen[id(values)] = tensor.cpu() if rank() == 0 else None
    return seen[id(values)]


def placed(tensor, like):
    """What of a whole tensor belongs to this process, if `like`, a tensor of its shape, is sharded; else the tensor."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)      # each reads its own part
