"""Counts the kernels of a pretraining step on a GPU, and the bytes that they move, without a GPU.

    python benchmarks/gpu/kernel_count.py [--steps small_64_8 base_96_2] [--by-operation] [--json]

Fake tensors have a device, shapes and types but no values. On those of a CUDA device the real step runs in bf16: views,
forward and backward pass, clipping, fused AdamW. An operation that computes counts as one kernel, and so does each of
the depthwise convolution's; views and allocations count as none. Bytes are those of the tensors that an operation reads
and writes. `syncs` are the times that the host waits for a value of the device, `copies` those between the two.
"""

import argparse
import ctypes
import json
import math
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_mim.config import PRESETS, PretrainConfig
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.build import build_network
from nnunet_mim.pretraining.distributed.ranks import ALONE
from nnunet_mim.pretraining.half_precision import HalfPrecisionCopy
from nnunet_mim.pretraining.objective.masks import on_device
from nnunet_mim.pretraining.objective.views import nested_views
from nnunet_mim.pretraining.state import build_optimizer
from nnunet_mim.pretraining.step import ordinary_step

STEPS = {  # preset, view size, crops of a step, children of a view of levels 1 and 2
    "small_64_8": ("small", 64, 8, (2, 2)),
    "base_96_2": ("base", 96, 2, (4, 4)),
    "large_96_2": ("large", 96, 2, (4, 4)),
}
NO_KERNEL = {
    "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense",
    "lift_fresh",
}  # fmt: skip
INSIDE = {  # operations of this package: the kernels that they launch
    "masked_depthwise": 2,  # the weight's transposition, the convolution
    "masked_depthwise_backward": 6,  # the same; partial sums of the weight's gradient, their sum, its layout; bias
    "bias_gelu_backward": 3,  # the gradients; the sum of the bias's parts, its rounding
    "add_norm_backward": 3,
    "norm_gelu_backward": 3,
    "_scaled_dot_product_flash_attention_backward": 3,  # row sums; gradients; that of the queries to half precision
}
PRETENDED = {  # what torch asks the device or the type of a tensor for, and the answer of a real GPU
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    "torch.cuda.is_bf16_supported": lambda: True,
    "torch.nn.utils.clip_grad._has_foreach_support": lambda *_: True,
    "torch.nn.functional.scaled_dot_product_attention": lambda *qkv: _flash_attention(*qkv)[0],
}
_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention
PRIMARY_CONTEXT = 4
"""number of CUDAHooksInterface::hasPrimaryContext among the virtual methods: autograd asks it before a backward pass"""


class NotPretendedError(RuntimeError):
    """This build of torch cannot be made to compute with fake tensors of a CUDA device."""


@contextmanager
def pretended_cuda():
    """Fake tensors of a CUDA device can be computed with, forward and backward, on a machine without one.

    Raises:
        NotPretendedError: this build of torch has other inner parts than this function knows.
    """
    if torch.cuda.is_available():
        yield
        return
    try:
        hooks, methods, original, _answer = _hooks_without_context()
    except (OSError, AttributeError) as error:
        raise NotPretendedError(f"torch {torch.__version__} has its CUDA hooks elsewhere: {error}") from error
    with ExitStack() as stack:
        for name, value in PRETENDED.items():
            stack.enter_context(patch(name, value))
        stack.callback(setattr, hooks, "value", original)
        hooks.value = ctypes.addressof(methods) + 2 * ctypes.sizeof(ctypes.c_void_p)
        try:
            with FakeTensorMode():
                torch.ones(1, device="cuda", requires_grad=True).sum().backward()
        except RuntimeError as error:
            raise NotPretendedError(f"torch {torch.__version__} asks its CUDA hooks otherwise: {error}") from error
        yield


def _hooks_without_context():
    """torch's CUDA hooks; a copy of their table of methods in which no device has a context; the table now."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    find = library["_ZN2at6detail12getCUDAHooksEv"]
    find.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(find())
    table = ctypes.c_void_p * 130  # two words before the first method, and more than there are methods
    methods = table.from_buffer_copy(table.from_address(hooks.value - 2 * ctypes.sizeof(ctypes.c_void_p)))
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda *_: False)
    methods[2 + PRIMARY_CONTEXT] = ctypes.cast(answer, ctypes.c_void_p).value
    return hooks, methods, hooks.value, answer


class KernelCount(TorchDispatchMode):
    """Counts what the operations inside would do on a CUDA device."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes = Counter(), Counter()  # by operation
        self.syncs = self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "prim":
            return func(*args, **kwargs or {})
        inputs = _tensors((args, kwargs))
        on_cuda = [tensor for tensor in inputs if _place(tensor) == "cuda"]
        if name == "_local_scalar_dense":
            self.syncs += len(on_cuda)
            return {torch.bool: True}.get(inputs[0].dtype, 1.0 if inputs[0].is_floating_point() else 1)
        out = func(*args, **kwargs or {})
        outputs = _tensors(out)
        places = {_place(tensor) for tensor in [*outputs, *on_cuda]}
        # an operation takes a single value of the host as a number
        arrays = [tensor for tensor in inputs if _place(tensor) == "cpu" and (tensor.ndim or "copy" in name)]
        if "cuda" in places and (arrays or (on_cuda and "cpu" in places)):
            self.copies += 1
        elif "cuda" in places and name not in NO_KERNEL and not _is_view(func):
            self.kernels[name] += INSIDE.get(name, 1)
            self.bytes[name] += _bytes_moved(name, on_cuda, outputs)
        return out

    def figures(self):
        """The totals."""
        kernels, moved = sum(self.kernels.values()), sum(self.bytes.values())
        return {"kernels": kernels, "gb": round(moved / 1e9, 2), "syncs": self.syncs, "copies": self.copies}


def _tensors(values):
    return [value for value in tree_leaves(values) if torch.is_tensor(value)]


def _place(tensor):
    """Type of a tensor's device; asking a fake tensor for `device` is an operation too."""
    return (tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device).type


def _is_view(func):
    """Whether an operation only looks at its input in another way."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _bytes_moved(name, inputs, outputs):
    """Bytes that are read and written; a lookup reads as much of its first input as it returns."""
    sizes = [math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step) * t.itemsize for t in inputs]
    written = sum(tensor.numel() * tensor.itemsize for tensor in outputs)
    if name in ("index", "gather", "index_select") and sizes:
        sizes[0] = min(sizes[0], written)
    return sum(sizes) + written


def make_step(config, alter=lambda views: views, recompute=(), ranks=ALONE, views_per_pass=None, half=True):
    """A function that does one optimiser step on fake tensors; `alter` changes its views, `half` is bf16."""
    device = torch.device("cuda", 0)
    with torch.device(device):
        model = build_network(config)
    levels = levels_of(config)
    crops = torch.empty(config.batch_size, config.in_channels, *levels[0].fov, device=device)
    valid = torch.empty(config.batch_size, 3, 2, dtype=torch.int64, device=device)
    fill, flat = (torch.empty(config.in_channels, device=device) for _ in range(2))
    generator = torch.Generator()
    forward, optimizer = HalfPrecisionCopy(model) if half else model, build_optimizer(model, config)
    train_step = ordinary_step(forward, model, optimizer, flat, config, ranks, views_per_pass, recompute)

    def step():
        train_step(alter(nested_views(crops, valid, fill, levels, generator, flat, ranks)))

    return step


def count(config, alter=lambda views: views, recompute=(), ranks=ALONE, **options):
    """KernelCount of one step, the second: the first makes the optimiser's state and the geometry's tensors. Arguments
    as of `make_step`.
    """
    on_device.cache_clear()  # fake tensors of another mode
    try:
        with pretended_cuda(), FakeTensorMode(allow_non_fake_inputs=True):
            step = make_step(config, alter, recompute, ranks, **options)
            for _ in range(2):
                with KernelCount() as counted:
                    step()
            return counted
    finally:
        on_device.cache_clear()


def config_of(preset, view, batch, n_children, **changes):
    size = (view,) * 3
    return PretrainConfig(
        preset=preset, network=PRESETS[preset], view_size=size, batch_size=batch, n_children=n_children, **changes
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS), help="preset_view_crops")
    parser.add_argument("--by-operation", action="store_true", help="what the kernels of each step are")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    print(f"torch {torch.__version__}\n\n| step | kernels | GB | syncs | copies |\n|---|---|---|---|---|")
    found = {}
    for name in options.steps:
        counted = count(config_of(*STEPS[name]))
        found[name] = counted.figures()
        print(f"| {name} | {' | '.join(str(value) for value in found[name].values())} |", flush=True)
        for operation, kernels in counted.kernels.most_common() if options.by_operation else ():
            print(f"| {operation} | {kernels} | {counted.bytes[operation] / 1e9:.2f} | | |")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
