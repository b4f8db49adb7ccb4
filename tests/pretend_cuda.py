"""A pretended CUDA device: values are computed on the CPU, of tensors that claim to lie on a card.

    with PretendedCard():
        run(stage, ...)         # raises where a card would

A tensor lies on the card if its storage carries a mark. Views share the storage; results lie where
their inputs lie. Two of torch's modes see to that:
- the function mode sees what Python calls. It answers for `.device` and takes all that names one.
- the dispatch mode sees every operation, those of backward passes too, and refuses what mixes
  devices. As CUDA, it lets pass copies, scalars (0 dimensions) and indices that lie on the CPU.
The optimizers of bitsandbytes also pass the checks that precede its CUDA kernels. Not seen: what
kernels themselves refuse, the order of what runs at the same time, memory, time.
"""
import contextlib
import types
from unittest import mock

import bitsandbytes  # noqa: F401  loaded before a card is there, so that it takes its CPU library
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten, Tensor, CARD, CPU = torch.ops.aten, torch.Tensor, torch.device("cuda", 0), torch.device("cpu")
COPIES = {aten.copy_, aten._to_copy, aten._foreach_copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# kernels that read each tensor of a list on the card, scalars as well
LISTED = {aten.cat, aten.stack, aten._fused_adamw_}
ANSWERS = {Tensor.device.__get__: CARD, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False,
           Tensor.get_device: 0}


def on_card(tensor):
    """Whether a tensor lies on the pretended card."""
    with torch._C.DisableTorchFunction():
        return not tensor.is_meta and getattr(tensor.untyped_storage(), "on_card", False)


def put(tensor, there):
    """Mark a tensor, and all that share its storage, as lying on the card or not."""
    with torch._C.DisableTorchFunction():
        if not tensor.is_meta:
            tensor.untyped_storage().on_card = there
    return tensor


def tensors_of(*values):
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def refuse(message):
    """Every mistake that is found goes through here."""
    raise RuntimeError(message)


class PretendedCard(TorchFunctionMode):
    def __init__(self, gigabytes=80):
        super().__init__()
        self.making = False         # where C++ makes tensors of no others
        memory = int(gigabytes * 1e9)
        rng_state = torch.zeros(16, dtype=torch.uint8)
        about = types.SimpleNamespace(name="pretended", major=9, minor=0, total_memory=memory,
                                      multi_processor_count=132)
        results = {
            "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
            "device": contextlib.nullcontext(), "synchronize": None, "empty_cache": None,
            "mem_get_info": (memory, memory), "memory_reserved": 0, "memory_allocated": 0,
            "get_device_capability": (9, 0), "get_device_properties": about,
            "get_rng_state": rng_state, "set_rng_state": None,
            "is_current_stream_capturing": False}
        self.entered, self.patches = 0, [Dispatch(self)] + [
            mock.patch.object(torch.cuda, name, lambda *args, value=value, **kwargs: value)
            for name, value in results.items()]

    def __enter__(self):
        if not self.entered:
            self.stack = contextlib.ExitStack()
            for patch in self.patches:
                self.stack.enter_context(patch)
        self.entered += 1
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.entered -= 1
        if not self.entered:
            self.stack.close()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        there = any(map(on_card, tensors_of(args, kwargs)))
        if there and func in ANSWERS:
            return ANSWERS[func]
        if there and func in (Tensor.numpy, Tensor.__array__):
            refuse("can't convert cuda:0 device type tensor to numpy")
        if func in (Tensor.cpu, Tensor.cuda):
            return self.move(args[0], "cpu" if func is Tensor.cpu else "cuda")
        if func in (Tensor.to, torch.as_tensor) and isinstance(args[0], Tensor):
            return self.move(*args, **kwargs)
        if func is Tensor.backward:     # in its hooks, Python is to be seen again
            with self, self.makes(there):
                return torch.autograd.backward(args[0], kwargs.pop("gradient", None), **kwargs)
        if kwargs.get("device") is None:
            with self.makes(there):
                return func(*args, **kwargs)
        device = torch.device(kwargs.pop("device"))
        if device.type == "meta":
            return func(*args, device=device, **kwargs)
        with self.makes(device.type == "cuda"):
            return put(func(*args, device=CPU, **kwargs), device.type == "cuda")

    @contextlib.contextmanager
    def makes(self, there):
        before, self.making = self.making, there
        try:
            yield
        finally:
            self.making = before

    def move(self, tensor, *args, copy=False, **kwargs):
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "meta":
            return Tensor.to(tensor, device, dtype or tensor.dtype)
        before = on_card(tensor)
        if args and isinstance(args[0], Tensor):
            there = on_card(args[0])
        else:
            there = before if device is None else device.type == "cuda"
        layout = {"memory_format": layout} if layout else {}
        out = Tensor.to(tensor, dtype or tensor.dtype, copy=copy or before != there, **layout)
        return put(out, there)


class Dispatch(TorchDispatchMode):
    def __init__(self, card):
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, tensors = kwargs or {}, [x for x in tensors_of(args, kwargs) if not x.is_meta]
        there = list(map(on_card, tensors))
        if any(there) or self.card.making and not tensors:
            self.check(func, args, kwargs, tensors)
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
            lies = any(there) if tensors else self.card.making
            for x in tensors_of(out):
                # marked already: it is one of the inputs, or a view
                if not x.is_meta and not hasattr(x.untyped_storage(), "on_card"):
                    put(x, there[0] if func.overloadpacket in COPIES else lies)
        return out

    def check(self, func, args, kwargs, tensors):
        packet = func.overloadpacket
        if any(isinstance(x, torch.Generator) for x in tree_leaves((args, kwargs))):
            refuse(f"{func}: Expected a 'cuda' device type for generator but found 'cpu'")
        if packet in INDEXED and on_card(args[0]):
            tensors = tensors_of(args[0], *args[2:])
        writes = func._schema.is_mutable and isinstance(args[0], Tensor)
        wrong = [x for x in tensors if not on_card(x)
                 and (x.dim() or packet in LISTED or writes and x is args[0])]
        if wrong and packet not in COPIES:
            places = ", ".join(f"{tuple(x.shape)} on {'cuda:0' if on_card(x) else 'cpu'}"
                               for x in tensors)
            refuse(f"Expected all tensors to be on the same device, but {func} got {places}")
        if func.namespace == "bitsandbytes" and "optimizer_update" in func._opname:
            try_kernel(func, args, kwargs)


def try_kernel(func, args, kwargs):
    """What bitsandbytes' CUDA function of an optimizer checks, with kernels that do nothing."""
    with mock.patch.object(torch._C, "_cuda_getCurrentRawStream", None, create=True):
        from bitsandbytes.backends.cuda import ops

    def nothing(*args):
        return contextlib.nullcontext()
    kernels = {table: {name: (nothing,) * len(found) for name, found in getattr(ops, table).items()}
               for table in ("str2optimizer32bit", "str2optimizer8bit_blockwise")}
    with mock.patch.multiple(ops, **kernels, _cuda_device_of=nothing, get_ptr=nothing):
        try:
            getattr(ops, f"_{func._opname}_impl")(*args, **kwargs)
        except ValueError as e:
            refuse(f"{func}: {e}")
