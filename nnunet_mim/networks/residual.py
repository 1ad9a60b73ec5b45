"""Residual streams, and what may be computed in one kernel there: addition and LayerNorm, bias and GELU.

A block leaves its branch to be added by the next normalisation, so that both are one kernel in the half-precision steps
of a GPU. Everywhere else PyTorch's operations compute the same, one after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_mim.networks.depthwise import use_triton


class Stream(NamedTuple):
    """A residual stream (..., C) and the branch that is still to be added."""

    x: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None
    """(C,) of the branch, where it is still to be added"""

    def joined(self) -> Tensor:
        """The stream with its branch."""
        if self.branch is None:
            return self.x
        return self.x + (self.branch if self.bias is None else self.branch + self.bias)


def add_and_norm(stream: Stream, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Add the branch; the stream and its LayerNorm."""
    if stream.branch is not None and stream.bias is not None:
        from nnunet_mim.networks.fused_triton import add_norm

        x, normed, _, _ = add_norm(stream.x, stream.branch, stream.bias, norm.weight, norm.bias, norm.eps)
        return x, normed
    x = stream.joined()
    return x, norm(x)


def with_branch(
    x: Tensor, features: Tensor, linear: nn.Linear | nn.Conv3d, drop_path: DropPath, norm_follows: bool = True
) -> Stream:
    """A stream whose branch is a linear layer (or a 1x1x1 convolution, channels last) of features (..., C_in).

    Args:
        norm_follows: whether the branch is added by `add_and_norm`; else its bias is not left to be added.
    """
    if norm_follows and fuses(x) and not drop_path.drops:
        return Stream(x, F.linear(features, linear.weight.flatten(1)), linear.bias)
    return Stream(x, drop_path(linear(features)))


def linear_gelu(x: Tensor, linear: nn.Linear | nn.Conv3d) -> Tensor:
    """A linear layer (or a 1x1x1 convolution, channels last) and GELU: (..., C_in) → (..., C_out)."""
    if fuses(x) and linear.bias is not None:
        from nnunet_mim.networks.fused_triton import bias_gelu

        return bias_gelu(F.linear(x, linear.weight.flatten(1)), linear.bias)
    return F.gelu(linear(x))


def norm_gelu(x: Tensor, bias: Tensor, norm: nn.LayerNorm) -> Tensor:
    """GELU(LayerNorm(x + bias)) of x (..., C)."""
    from nnunet_mim.networks import fused_triton

    return fused_triton.norm_gelu(x, bias, norm.weight, norm.bias, norm.eps)[0]


def fuses(x: Tensor) -> bool:
    """Whether the Triton kernels take over: on CUDA in bfloat16, without autocast and torch.compile."""
    plain = x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    return plain and use_triton(x.device) and not torch.is_autocast_enabled(x.device.type)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training drop some samples' residual branch, rescale the others'."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    @property
    def drops(self) -> bool:
        """Whether it does anything now."""
        return self.probability > 0.0 and self.training

    def forward(self, x: Tensor) -> Tensor:
        if not self.drops:
            return x
        keep = x.new_empty(x.shape[0], *([1] * (x.ndim - 1))).bernoulli_(1 - self.probability)  # (N, 1, ..., 1)
        return x * keep / (1 - self.probability)
