"""Depthwise convolution on visible tokens only.

`depthwise_on_tokens` defines what is computed, with PyTorch's own operations. Faster code takes over where it can:
`MaskedDepthwise` on a CPU, depthwise_triton.py on a GPU with Triton (NNUNET_MIM_TRITON=0 switches it off).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nnunet_mim.config import Size3
from nnunet_mim.networks.depthwise_cpu import MaskedDepthwise, depthwise_on_tokens
from nnunet_mim.networks.token_layout import join, view_of_token

TRITON = (3, 3)
"""oldest version that compiles the kernels; it comes with torch 2.7"""


def _has_triton() -> bool:
    """Whether Triton is installed and new enough; one that is too old is named."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build under another name, as for Windows
        return True
    new_enough = tuple(int(number) for number in re.findall(r"\d+", version)[:2]) >= TRITON
    if not new_enough:
        warnings.warn(
            f"Triton {version} is too old for the fast depthwise convolution, PyTorch's takes its place on a GPU: "
            f"pip install 'triton>={TRITON[0]}.{TRITON[1]}'",
            stacklevel=2,
        )
    return new_enough


HAS_TRITON = _has_triton()  # asked once: torch.compile cannot trace the question


class DepthwiseConv3d(nn.Conv3d):
    """Weight (C, 1, k, k, k) and bias (C,) of a depthwise convolution, which a `SpatialConv` applies."""

    def __init__(self, channels: int, kernel_size: int = 5) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)


SpatialConv = Callable[[DepthwiseConv3d, Tensor], Tensor]
"""Applies a depthwise convolution to boxes (T, X, Y, Z, C), with zero padding that keeps their size."""


def conv_on_tokens(ids_keep: Sequence[Tensor], grid: Size3) -> SpatialConv:
    """The convolution of pretraining: the boxes are visible tokens, and masked voxels count as zero.

    Args:
        ids_keep: for each group of views (N, K) int64, raster numbers of the visible tokens. The T boxes are the tokens
            of the first view, of the second, and so on, one group after the other.
        grid: tokens per axis.
    """
    if use_triton(ids_keep[0].device):
        return _triton_conv(ids_keep, grid)
    sizes = [ids.numel() for ids in ids_keep]

    def convolve(conv: DepthwiseConv3d, x: Tensor) -> Tensor:
        dtype = x.dtype
        if dtype == torch.bfloat16 and x.device.type == "cpu":
            x = x.float()  # sums are float32, as in the Triton kernels
        weight, bias = conv.weight.to(x.dtype), None if conv.bias is None else conv.bias.to(x.dtype)
        function = MaskedDepthwise.apply if use_cpu_path(x) else depthwise_on_tokens
        results = []
        for boxes, ids in zip(x.split(sizes), ids_keep, strict=True):
            boxes = boxes.unflatten(0, ids.shape)  # (N, K, X, Y, Z, C)
            results.append(function(boxes, weight, bias, ids, grid).flatten(0, 1))  # type: ignore[no-untyped-call]
        return join(results).to(dtype)

    return convolve


def conv_on_patches(n_samples: int, device: torch.device) -> SpatialConv:
    """The convolution of finetuning: the only box of each sample is its whole patch, (N, X, Y, Z, C)."""
    return conv_on_tokens([torch.zeros(n_samples, 1, dtype=torch.int64, device=device)], (1, 1, 1))


def use_cpu_path(x: Tensor) -> bool:
    """Whether `MaskedDepthwise` takes over: in float32 training on a CPU, without autocast and torch.compile."""
    eager = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    return eager and x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_grad_enabled()


def use_triton(device: torch.device) -> bool:
    """Whether the Triton kernels take over: on CUDA, with Triton installed and not switched off."""
    return device.type == "cuda" and HAS_TRITON and os.environ.get("NNUNET_MIM_TRITON") != "0"


def _triton_conv(ids_keep: Sequence[Tensor], grid: Size3) -> SpatialConv:
    from nnunet_mim.networks.depthwise_triton import masked_depthwise, rims, slot_table

    ids, view = join([group.flatten() for group in ids_keep]), view_of_token(ids_keep)
    n_views = sum(len(group) for group in ids_keep)
    tables: dict[tuple[int, ...], Tensor] = {}  # rim → table: stages whose kernels reach equally far share one

    def convolve(conv: DepthwiseConv3d, x: Tensor) -> Tensor:
        _, X, Y, Z, _ = x.shape
        token, kernel = [X, Y, Z], conv.kernel_size[0]
        rim = tuple(rims(token, kernel))
        if rim not in tables:
            tables[rim] = slot_table(ids, view, n_views, list(grid), token, kernel)
        return masked_depthwise(x, conv.weight, conv.bias, ids, view, tables[rim], list(grid), token)

    return convolve
