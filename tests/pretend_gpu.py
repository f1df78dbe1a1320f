"""A GPU for code to believe in: tensors that say they are on cuda and live on the CPU.

What a GPU refuses raises here too: mixing devices, generators of the CPU for tensors of the GPU, waits while
a CUDA graph is recorded. Waits of the host for the GPU are counted. Values are real; whole runs can be made.
Not covered: torch.compile, NCCL, the limits of CUDA's own kernels, what CUDA's autocast does otherwise.
"""

import contextlib
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
REAL_DEVICE, REAL_AUTOCAST, REAL_IS_AUTOCAST = torch.Tensor.device, torch.autocast, torch.is_autocast_enabled
WAITS = set("item tolist cpu numpy __array__ __bool__ __int__ __float__ __index__ equal is_nonzero".split())
WAITS |= set("nonzero argwhere masked_select unique repeat_interleave_with_tensor boolean_index".split())
MAY_MIX = set("copy_ to __getitem__ __setitem__ type_as __set__ _has_compatible_shallow_copy_type".split())


class PretendGpu(TorchFunctionMode):
    """Runs every function of PyTorch on the CPU and knows which results would be on the GPU."""

    def __init__(self):
        self.on_gpu, self.waits, self.graphs, self.recording = WeakTensorKeyDictionary(), Counter(), 0, None
        self.memory = 80 * 10**9  # bytes

    def tag(self, tensor: torch.Tensor, tagged: bool = True) -> torch.Tensor:
        self.on_gpu.pop(tensor, None)
        if tagged:
            self.on_gpu[tensor] = True
        return tensor

    def wait(self, name: str) -> None:
        self.waits[name] += 1
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", str(function)), dict(kwargs or {})
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if x in self.on_gpu]
        strangers = [x for x in tensors if x not in self.on_gpu and x.ndim]
        if ours and strangers and name not in MAY_MIX:
            shapes = [tuple(x.shape) for x in strangers]
            raise RuntimeError(
                f"{name}: expected all tensors on cuda:0, but those of shapes {shapes} are on cpu"
            )
        if name in ("__getitem__", "__setitem__"):
            indices = [x for x in tree_iter(args[1]) if isinstance(x, torch.Tensor)]
            if args[0] not in self.on_gpu and any(x in self.on_gpu for x in indices):
                raise RuntimeError(f"{name}: indices on cuda for a tensor on cpu")
            if args[0] in self.on_gpu and any(x.dtype == torch.bool or x not in self.on_gpu for x in indices):
                self.wait("boolean_index")
            value = args[2] if name == "__setitem__" else None
            if indices and isinstance(value, torch.Tensor) and value.ndim:
                if (value in self.on_gpu) != (args[0] in self.on_gpu):
                    raise RuntimeError("__setitem__: indices, and a value on another device")
        if ours and name == "repeat_interleave" and isinstance((*args, None)[1], torch.Tensor):
            self.wait("repeat_interleave_with_tensor")
        if ours and name in WAITS:
            self.wait(name)
        if ours and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

        target = kwargs.get("device")
        if name in ("to", "type_as"):
            named = [x for x in args[1:] if isinstance(x, torch.device | str)]
            target = self.device_of(args[1]) if isinstance(args[1], torch.Tensor) else (*named, target)[0]
            args = tree_map_only(torch.device, lambda x: CPU, args)
        target = torch.device(target) if isinstance(target, str | int) else target
        on_gpu = bool(ours) if target is None else target.type == "cuda"
        if name == "cpu":
            on_gpu = False
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and on_gpu:
            raise RuntimeError(f"{name}: expected a 'cuda' generator but found 'cpu'")
        if target is not None and "device" in kwargs:
            kwargs["device"] = target if target.type == "meta" else CPU
        if name == "copy_" and (args[0] in self.on_gpu) != (args[1] in self.on_gpu):
            self.wait("copy_")
        if name == "to" and ours and not on_gpu:
            self.wait("to cpu")
        out = function(*args, **kwargs)
        if name == "__set__":  # of .data and .grad
            if function == torch.Tensor.data.__set__:
                self.tag(args[0], args[1] in self.on_gpu)
            return out
        if name in ("to", "cpu") and ours != [x for x in tensors if on_gpu]:
            out = out.clone() if out is args[0] else out  # moving makes a copy
        if isinstance(out, torch.Tensor) and any(out is x for x in tensors):
            pass  # it has changed in place
        elif on_gpu:
            tree_map_only(torch.Tensor, self.tag, out)
        if self.recording is not None:
            self.recording.append((function, args, kwargs, out))
        return out

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        return GPU if tensor in self.on_gpu else REAL_DEVICE.__get__(tensor)

    @contextlib.contextmanager
    def record(self, graph):
        """As torch.cuda.graph. What is recorded runs here at once, and not in the first replay."""
        self.graphs += 1
        graph.steps, graph.replays, self.recording = [], 0, []
        try:
            yield
        finally:
            graph.steps, self.recording = self.recording, None


class Graph:
    """As torch.cuda.CUDAGraph: the same functions on the same tensors, whatever Python has done since."""

    def replay(self) -> None:
        self.replays += 1
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for function, args, kwargs, out in self.steps if self.replays > 1 else ():
                new = function(*args, **kwargs)
                for old, x in zip(tree_iter(out), tree_iter(new)):
                    if isinstance(old, torch.Tensor) and x is not old:
                        old.copy_(x)


class DenseMask:
    """In place of BlockMask, which the CPU can only take forwards."""

    def __init__(self, sees, B, H, Q, KV, device):
        row, query = torch.arange(B, device=device)[:, None, None], torch.arange(Q, device=device)[:, None]
        self.visible = sees(row, None, query, torch.arange(KV, device=device))


def dense_attention(q, keys, values, block_mask, scale, enable_gqa):
    visible = block_mask.visible[:, None]
    return F.scaled_dot_product_attention(q, keys, values, visible, scale=scale, enable_gqa=enable_gqa)


@contextlib.contextmanager
def pretend_gpu(*scripts):
    """Inside, a GPU is found. Attention in blocks is dense, and torch.compile does nothing."""
    gpu, make_subclass = PretendGpu(), torch.Tensor._make_subclass

    def make_parameter(cls, data, *args):
        return gpu.tag(make_subclass(cls, data, *args), data in gpu.on_gpu)

    def autocast(device_type, *args, **kwargs):
        return REAL_AUTOCAST("cpu", *args, **kwargs)

    patches = {
        (torch.cuda, "is_available"): lambda: True,
        (torch.cuda, "get_device_capability"): lambda *_: (9, 0),
        (torch.cuda, "get_device_properties"): lambda *_: SimpleNamespace(total_memory=gpu.memory),
        (torch.cuda, "set_device"): lambda *_: None,
        (torch.cuda, "graph"): gpu.record,
        (torch.cuda, "CUDAGraph"): Graph,
        (torch, "autocast"): autocast,
        (torch, "is_autocast_enabled"): lambda *_: REAL_IS_AUTOCAST("cpu"),
        (torch, "compile"): lambda function, **_: function,
        (torch.Tensor, "device"): property(gpu.device_of),
        (torch.Tensor, "is_cuda"): property(lambda x: x in gpu.on_gpu),
        (torch.Tensor, "_make_subclass"): staticmethod(make_parameter),
    }
    names = {"BlockMask": DenseMask, "create_block_mask": DenseMask, "flex_attention": dense_attention}
    names["compile_once"] = lambda function, **_: function
    patches |= {(s, name): x for s in scripts for name, x in names.items() if hasattr(s, name)}
    with contextlib.ExitStack() as stack:
        for (place, name), replacement in patches.items():
            stack.enter_context(mock.patch.object(place, name, replacement))
        # What the backward pass computes again holds tensors that no function returned: no device to compare.
        metadata = {"default": lambda x: {"shape": x.shape, "dtype": x.dtype}}
        stack.enter_context(mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, metadata))
        stack.enter_context(gpu)
        yield gpu
