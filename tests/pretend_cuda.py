"""A pretended CUDA device: values are computed on the CPU, of tensors that claim to lie on a card.

    with pretended_card():
        run(stage, ...)         # raises where a card would

A tensor lies on the card if its storage carries a mark. Views share the storage; results lie where
their inputs lie. Two of torch's modes see to that. Calls sees what Python calls: it answers for
`.device` and takes what names one. Operations sees every operation, those of backward passes too,
and refuses what mixes devices. As CUDA, it lets pass copies, scalars (0 dimensions) and indices
that lie on the CPU. The optimizers of bitsandbytes also pass the checks before its CUDA kernels.

Not seen: what kernels themselves refuse or round otherwise, the order of what runs at the same
time, memory, speed, several cards.

    PYTHONPATH=tests python -m pytest -p pretend_cuda tests/test_gpu.py     # as if a card was there
"""
import contextlib
from unittest import mock

import bitsandbytes  # noqa: F401  loaded before a card is there, so that it takes its CPU library
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten, Tensor, CARD, CPU = torch.ops.aten, torch.Tensor, torch.device("cuda", 0), torch.device("cpu")
ANSWERS = {Tensor.device.__get__: CARD, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}
COPIES = {aten.copy_, aten._to_copy}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# their kernels read every tensor of a list on the card, scalars as well
LISTED = {aten.cat, aten.stack, aten._fused_adamw_}


def pytest_configure(config):
    stack = contextlib.ExitStack()
    config.add_cleanup(stack.close)
    stack.enter_context(pretended_card())


@contextlib.contextmanager
def pretended_card():
    """Within it, torch has one CUDA device. Raises AssertionError at its end if something was
    refused and the program went on."""
    answers = {"is_available": True, "device_count": 1, "mem_get_info": (80e9, 80e9),
               "memory_reserved": 0, "memory_allocated": 0, "synchronize": None,
               "is_current_stream_capturing": False}
    functions = {name: lambda *args, answer=answer: answer for name, answer in answers.items()}
    calls, run_backward = Calls(), torch.autograd._engine_run_backward

    def seen_backward(*args, **kwargs):
        with calls:         # it calls Python again: hooks, and what is recomputed
            return run_backward(*args, **kwargs)
    # what saves a tensor is not seen, what recomputes it is: their devices are not to be compared
    compared = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    with (mock.patch.multiple(torch.cuda, **functions), Operations(calls), calls,
          mock.patch.object(torch.autograd, "_engine_run_backward", seen_backward),
          mock.patch.dict(compared, default=lambda tensor: tensor.shape)):
        yield
    assert not calls.refused, calls.refused[0]


def on_card(tensor):
    with torch._C.DisableTorchFunction():
        return not tensor.is_meta and getattr(tensor.untyped_storage(), "on_card", False)


def put(tensor, there):
    """Mark a tensor, and all that share its storage, as lying on the card or not."""
    with torch._C.DisableTorchFunction():
        tensor.untyped_storage().on_card = there
    return tensor


def tensors_of(*values):
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class Calls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.makes_on_card = False      # where C++ makes a tensor that is made of no other
        self.refused = []

    def refuse(self, message):
        self.refused.append(message)
        raise RuntimeError(message)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        there = any(map(on_card, tensors_of(args, kwargs)))
        if there and func in ANSWERS:
            return ANSWERS[func]
        if there and func in (Tensor.numpy, Tensor.__array__):
            self.refuse("can't convert cuda:0 device type tensor to numpy")
        if func in (Tensor.cpu, Tensor.cuda):
            return self.move(args[0], "cpu" if func is Tensor.cpu else "cuda")
        if func in (Tensor.to, torch.as_tensor) and isinstance(args[0], Tensor):
            return self.move(*args, **kwargs)
        if kwargs.get("device") is None:
            with self.making(there):
                return func(*args, **kwargs)
        device = torch.device(kwargs.pop("device"))
        if device.type == "meta":
            return func(*args, device=device, **kwargs)
        there = device.type == "cuda"
        with self.making(there):
            return put(func(*args, device=CPU, **kwargs), there)

    @contextlib.contextmanager
    def making(self, there):
        before, self.makes_on_card = self.makes_on_card, there
        try:
            yield
        finally:
            self.makes_on_card = before

    def move(self, tensor, *args, copy=False, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        before = there = on_card(tensor)
        if args and isinstance(args[0], Tensor):
            there = on_card(args[0])
        elif device is not None:
            there = device.type == "cuda"
        return put(Tensor.to(tensor, dtype or tensor.dtype, copy=copy or there != before), there)


class Operations(TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tensors_of(args, kwargs) if not x.is_meta]
        there = list(map(on_card, tensors)) or [self.calls.makes_on_card]
        if any(there):
            self.check(func, args, kwargs, tensors)
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
            lies = there[0] if func.overloadpacket in COPIES else any(there)
            for x in tensors_of(out):
                # marked already: an input, or a view of one
                if not x.is_meta and not hasattr(x.untyped_storage(), "on_card"):
                    put(x, lies)
            return out

    def check(self, func, args, kwargs, tensors):
        packet = func.overloadpacket
        if any(isinstance(x, torch.Generator) for x in tree_leaves((args, kwargs))):
            self.calls.refuse(f"Expected a 'cuda' device type for generator of {func}")
        if packet in INDEXED and on_card(args[0]):
            tensors = tensors_of(args[0], args[2:])
        written = args[0] if args and func._schema.is_mutable else None
        wrong = [x for x in tensors if not on_card(x)
                 and (x.dim() or packet in LISTED or x is written)]
        if wrong and packet not in COPIES:
            places = [f"{'cuda' if on_card(x) else 'cpu'} {tuple(x.shape)}" for x in tensors]
            self.calls.refuse(f"Expected all tensors to be on the same device: {func} of {places}")
        if func.namespace == "bitsandbytes" and "optimizer_update" in func._opname:
            self.try_kernel(func._opname, args, kwargs)

    def try_kernel(self, name, args, kwargs):
        """Call bitsandbytes' CUDA function of an optimizer, with kernels that do nothing."""
        with mock.patch.object(torch._C, "_cuda_getCurrentRawStream", None, create=True):
            from bitsandbytes.backends.cuda import ops

        def nothing(*args):
            return contextlib.nullcontext()
        tables = {table: {key: (nothing,) * len(kernels) for key, kernels in found.items()}
                  for table, found in vars(ops).items() if table.startswith("str2optimizer")}
        with mock.patch.multiple(ops, **tables, _cuda_device_of=nothing, get_ptr=nothing):
            try:
                getattr(ops, f"_{name}_impl")(*args, **kwargs)
            except ValueError as e:
                self.calls.refuse(f"{name}: {e}")
