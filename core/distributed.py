"""Several processes, started by torchrun: who does what, and where the weights are.

    torchrun --nproc-per-node 8 sft.py ...       one process per GPU; all see the same files

Training shards weights, gradients and optimizer state over all processes (PyTorch's FSDP2).
Sampling and judging keep a whole model on each device and divide the batches. Only the first
process writes files and prints. Without torchrun, every function here does nothing.
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
    """Number of this process: 0 is the first."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def local_world():
    """Number of processes on this machine; they share its main memory."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world() > 1 else 1


# ---------------------------------------------------------------- start and end
@contextlib.contextmanager
def processes(prog):
    """Join the processes of a run and silence all but the first.

    prog: the stage's name, for the message of a process that ends because another one has failed.
    """
    if world() == 1:
        yield
        return
    if rank():
        sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def ended():
        signal.sigwait({signal.SIGTERM})
        lost(prog) if not failing else leave(1)
    # a thread: the main thread may be blocked in a collective, where no signal handler runs
    threading.Thread(target=ended, daemon=True).start()
    import torch
    import torch.distributed as dist
    # torchrun notices a dead process at once; the limit must only outlast reading and writing the
    # largest model
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    yield
    first(lambda: None)     # wait until all are done
    dist.destroy_process_group()
    leave(0)


def leave(code):
    """Exit one of several processes immediately with os._exit(code). One process: do nothing.

    Normal interpreter shutdown sometimes aborts inside gloo threads. On bad input (code 2) all
    processes fail; the first one, which prints the error, waits a second for the others.
    """
    if world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(code == 2 and rank() == 0)
        os._exit(code)


def lost(prog, words=""):
    """Say that another process has failed, and exit.

    words: what the failed collective says. It may itself be the cause, such as a network on which
    no process reaches another.
    """
    if rank() < 2:      # process 0 or 1 is still there to say it
        print(f"{prog}: error: process {rank()} of {world()}: another process has failed; once its "
              "cause is mended the same command, with any number of processes, continues from what "
              "was saved" + (f" ({words})" if words else ""), file=sys.stderr)
    leave(1)


failing = []        # not empty once this process shows an error of its own


def give_way():
    """Before an error is shown, wait for the first process to show it.

    An error that all processes have is shown by the first one, and torchrun then ends the others.
    """
    if rank():
        failing.append(True)
        time.sleep(5)


def is_loss_of_another(error):
    """Whether a collective failed because a process is gone, by the words of gloo and NCCL."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL",
             "Connection refused", "gloo")
    return world() > 1 and isinstance(error, RuntimeError) and any(w in str(error) for w in words)


# ---------------------------------------------------------------- who does what
def first(function):
    """function(), called by the first process only.

    All processes get its value (a picklable object) or its exception.
    """
    if world() == 1:
        return function()
    import torch.distributed as dist
    said = [None, None]     # value, exception
    if rank() == 0:
        try:
            said[0] = function()
        except Exception as e:
            said[1] = e
    dist.broadcast_object_list(said, 0)
    if said[1] is not None:
        raise said[1]
    return said[0]


def deal(items, work):
    """Yield work(item) of each item, in order, to all processes. Results must be picklable.

    Of W processes, each works on every W-th item.
    """
    if world() == 1:
        yield from map(work, items)
        return
    import torch.distributed as dist
    for start in range(0, len(items), world()):
        own = start + rank()
        results = [None] * world()
        dist.all_gather_object(results, work(items[own]) if own < len(items) else None)
        yield from results[:len(items) - start]


def is_sharded(model):
    """Whether `shard` has divided this model over the processes."""
    return getattr(model, "within_forward", None) is not None


def own_share(items, model):
    """This process's share of a batch, if the processes share it because the model is sharded.

    items: sorted by cost; they are dealt 0 1 2 2 1 0 0 1 2 ..., so that all get about the same.
    """
    if not is_sharded(model):
        return items
    n, share = world(), []
    for i, item in enumerate(items):
        turn, place = divmod(i, n)
        if rank() == (place if turn % 2 == 0 else n - 1 - place):
            share.append(item)
    return share


def most(count, model):
    """The largest `count` over the processes of a sharded model.

    All of them must make the same number of forward passes.
    """
    if not is_sharded(model):
        return count
    import torch
    import torch.distributed as dist
    count = torch.tensor(count)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return count.item()


def summed(value, model):
    """The sum of a tensor, or of a float (in float64), over the processes of a sharded model."""
    if not is_sharded(model):
        return value
    import torch
    import torch.distributed as dist
    is_tensor = torch.is_tensor(value)
    total = value.clone() if is_tensor else torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total if is_tensor else total.item()


# ---------------------------------------------------------------- where the weights are
def home(device):
    """Where a process holds a new model before it is sharded or delivered.

    The first process holds it in main memory, the others hold no weights (device "meta").
    """
    import torch
    return device if world() == 1 else torch.device("cpu" if rank() == 0 else "meta")


def deliver(part, device):
    """Copy all weights and buffers of a module from the first process to everyone's device.

    Sharded and 4-bit tensors are left out. Tied tensors stay tied. One process: does nothing.
    """
    if world() == 1:
        return
    import torch
    import torch.distributed as dist

    def tensors():
        for name, module in part.named_modules():
            for key, value in {**vars(module), **module._parameters, **module._buffers}.items():
                if (torch.is_tensor(value) and not hasattr(value, "full_tensor")
                        and not hasattr(value, "quant_state")):
                    yield name, key, value

    def plan():        # [(places, shape, dtype, whether it is trained)]; a tied tensor has 2 places
        found = {}
        for name, key, value in tensors():
            entry = [[], tuple(value.shape), value.dtype, value.requires_grad]
            found.setdefault(id(value), entry)[0].append((name, key))
        return list(found.values())

    for places, shape, dtype, trained in first(plan):
        old = getattr(part.get_submodule(places[0][0]), places[0][1])
        if rank() == 0:
            new = old.detach().to(device)
        else:
            new = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(new, 0)
        if isinstance(old, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=trained)
        for name, key in places:
            setattr(part.get_submodule(name), key, new)


def inside_forward(function):
    """Decorator: run function(model, batch) as a forward pass of the whole model.

    The weights of a sharded model are gathered only inside a forward pass.
    """
    @functools.wraps(function)
    def call(model, batch):
        if is_sharded(model):
            return model.within_forward(function, batch)
        return function(model, batch)
    return call


def layers_of(model):
    """The model's decoder layers: the outermost ModuleList as long as its config says."""
    import torch
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def shard(model, device):
    """Shard a model from `open_model(..., shards=True)` over all processes, in place.

    fully_shard on every layer, then on the rest (embeddings, head). No process ever holds more than
    its share and one or two gathered layers. Gradients are summed, not averaged, because the loss
    is divided by the weight of the whole batch already. One process: does nothing.
    """
    if world() == 1:
        return
    gc.collect()        # an earlier sharded model is in reference cycles and would stay in memory
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )
    mixed = MixedPrecisionPolicy()
    if model.dtype != model.compute_dtype:      # learns in fp32, computes in 16 bits
        mixed = MixedPrecisionPolicy(model.compute_dtype, reduce_dtype=model.dtype)
    mesh = init_device_mesh(device.type, (world(),))
    for unit in [*layers_of(model), model]:
        deliver(unit, device)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=mixed)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)        # the only reduction that gloo has
    model.within_forward = lambda function, batch: function(model, batch)
    register_fsdp_forward_method(model, "within_forward")


def full(tensor):
    """The whole tensor, gathered from all processes if it is sharded."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(values, seen=None):
    """Nested dicts and lists of tensors, with the sharded ones gathered in the first process.

    They are gathered one at a time into main memory; the other processes get None for them. Tied
    tensors stay one (seen: those gathered so far). One process: values as they are.
    """
    if world() == 1:
        return values
    seen = {} if seen is None else seen
    if isinstance(values, dict):
        return {key: gathered(value, seen) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(gathered(value, seen) for value in values)
    if not hasattr(values, "full_tensor"):
        return values
    if id(values) not in seen:
        tensor = full(values)       # all processes must take part
        seen[id(values)] = tensor.cpu() if rank() == 0 else None
    return seen[id(values)]


def placed(tensor, like):
    """This process's part of a whole tensor, if `like`, of the same shape, is sharded.

    Otherwise the tensor itself.
    """
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    # src_data_rank=None: every process has read the whole tensor and keeps its own part
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements,
                             src_data_rank=None)
