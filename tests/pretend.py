"""A pretend GPU: tensors that say `cuda:0` and are computed on the CPU, and raise where CUDA would.

Raised is, as by CUDA: tensors of two devices in one operation, a CPU generator for numbers on the device, and what the
flash kernel refuses. Counted is what makes the host wait: numbers that it asks for, shapes that only the device knows,
and copies that are not asynchronous. Unlike `FakeTensorMode` it computes, so results can be compared. There is no
backward pass: torch's engine wants a compiled guard of the device.

`test_gpu.py` runs the project on it.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from yojo import weights
from yojo.core import ops

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
ASKS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_dim)
INDEXING = (aten.index, aten.index_put, aten.index_put_)
MOVES = (aten._to_copy, aten.copy_)
waits: Counter[str] = Counter()  # by what was waited for


class OnGpu(torch.Tensor):
    @staticmethod
    def __new__(cls, host: torch.Tensor):
        shape = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device="meta")
        new = torch.Tensor._make_subclass(cls, shape, False, dispatch_device=True, device_for_backend_keys=CUDA)
        new.host = host.detach()
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_meta = False

    def tolist(self):
        waits["tolist"] += 1
        return self.host.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first")

    __array__ = numpy


def on_host(x):
    return x.host if isinstance(x, OnGpu) else x


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def run(func, args: tuple, kwargs: dict):
    """One operation, some of whose tensors, or its result, are on the device."""
    packet, device = func.overloadpacket, kwargs.get("device")
    if packet is torch.ops.prim.device:
        return CUDA if isinstance(args[0], OnGpu) else args[0].device
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, OnGpu)]
    there = [x for x in tensors if not isinstance(x, OnGpu) and not x.is_meta]
    gpu = is_cuda(device) if device is not None else bool(here)
    if gpu and kwargs.get("generator") is not None and kwargs["generator"].device.type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if packet in MOVES:
        crosses = bool(here) != gpu if packet is aten._to_copy else 0 < len(here) < len(tensors)
        quick = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        waits["copy"] += crosses and not (quick and gpu)
    elif here:
        check(packet, there, args)
    if packet is aten._scaled_dot_product_flash_attention:
        return flash(*args, **kwargs)
    if packet is aten._fused_sdp_choice:
        return 0  # by plain operations
    on_cpu = {**kwargs, "device": torch.device("cpu")} if is_cuda(device) else kwargs
    guard = torch._C._DisableTorchDispatch()
    try:
        out = func(*tree_map(on_host, args), **tree_map(on_host, on_cpu))
    finally:
        del guard  # or a traceback would keep it
    known = {id(x.host): x for x in here}  # what is written in place is given back as it came
    wrapped = OnGpu if gpu else on_host
    return tree_map(lambda x: known.get(id(x), wrapped(x)) if isinstance(x, torch.Tensor) else x, out)


def check(packet, there: list, args: tuple) -> None:
    """Tensors of the host among those of the device: a number may come along, and indices are copied."""
    if packet in ASKS:
        waits[str(packet)] += 1
    indices = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)] if packet in INDEXING else []
    waits["index"] += sum(not isinstance(i, OnGpu) or i.dtype == torch.bool for i in indices)
    alone = (aten.cat, aten.mm, aten.addmm, aten.bmm)  # which take not even a number from the host
    for x in there:
        if not any(x is i for i in indices) and (x.ndim or packet in alone):
            found = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            raise RuntimeError(f"{found} ({packet})")


def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """What the kernel refuses, and softmax(q k^T / sqrt(d)) v; causal: the last query beside the last key."""
    for x in (q, k, v):
        if x.dtype not in (torch.float16, torch.bfloat16) or x.stride(-1) != 1 or x.shape[-1] % 8 or not x.shape[2]:
            raise RuntimeError(f"FlashAttention does not take {x.dtype} {tuple(x.shape)}, strides {x.stride()}")
    q_, k_, v_ = (x.host.double() for x in (q, k, v))
    k_, v_ = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k_, v_))
    scores = q_ @ k_.mT * q.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).bool().tril(k.shape[2] - q.shape[2]), -torch.inf)
    nothing = OnGpu(torch.empty(0))
    out = OnGpu((scores.softmax(-1) @ v_).to(q.dtype))
    return out, nothing, None, None, q.shape[2], k.shape[2], nothing, nothing, nothing


def can_use_flash(params) -> bool:
    tensors = (params.query, params.key, params.value)
    half = params.query.dtype in (torch.float16, torch.bfloat16)
    return half and params.attn_mask is None and all(x.stride(-1) == 1 for x in tensors)


class Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        mine = is_cuda(kwargs.get("device")) or any(isinstance(x, OnGpu) for x in tree_leaves((args, kwargs)))
        return run(func, args, kwargs) if mine else func(*args, **kwargs)


def with_index(x):
    """Without a number of its own, a device would be asked for the current one."""
    return CUDA if isinstance(x, (str, torch.device)) and is_cuda(x) else x


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs["device"] = with_index(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(map(with_index, args))
        if func is torch.tensor and is_cuda(kwargs.get("device")):
            waits["copy"] += 1
            return OnGpu(func(*args, **{**kwargs, "device": "cpu"}))
        if func in GUARDED and any(isinstance(x, OnGpu) for x in tree_leaves(args)):
            return directly(func, args, kwargs)
        return func(*args, **kwargs)


# Which torch does not even begin without a compiled guard of the device.
GUARDED = {getattr(torch.Tensor, name) for name in "__getitem__ __setitem__ __invert__ __int__ __float__".split()}
GUARDED |= {torch.Tensor.contiguous, torch.Tensor.copy_, torch.Tensor.nonzero}


def directly(func, args: tuple, kwargs: dict):
    mine, more = isinstance(args[0], OnGpu), [x for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor)]
    if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)]
        if not mine and any(isinstance(i, OnGpu) for i in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        waits["index"] += sum(not isinstance(i, OnGpu) or i.dtype == torch.bool for i in indices)
        more = [x for x in tree_leaves(args[2:]) if isinstance(x, torch.Tensor)]
    elif func not in (torch.Tensor.__invert__, torch.Tensor.contiguous, torch.Tensor.copy_):
        waits[func.__name__] += 1
    if func in (torch.Tensor.copy_, torch.Tensor.__setitem__) and isinstance(more and more[0], OnGpu) != mine:
        waits["copy"] += not (mine and kwargs.get("non_blocking"))
    out = func(*tree_map(on_host, args), **tree_map(on_host, kwargs))
    if out is args[0] or out is on_host(args[0]):
        return args[0]
    return tree_map(lambda x: OnGpu(x) if mine and isinstance(x, torch.Tensor) else x, out)


def numbered(device) -> None:
    if isinstance(device, torch.device) and device.index is None:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")


@contextmanager
def gpu(monkeypatch):
    """Inside the block there is one GPU."""
    for name, value in {"is_available": True, "device_count": 1, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("_lazy_init", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a pretended GPU")
    monkeypatch.setattr(torch.cuda, "set_device", numbered)
    monkeypatch.setattr(weights, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(ops, "can_use_flash_attention", can_use_flash)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with ExitStack() as modes:
        modes.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        modes.enter_context(torch.no_grad())
        modes.enter_context(Functions())
        modes.enter_context(Factories())
        yield
