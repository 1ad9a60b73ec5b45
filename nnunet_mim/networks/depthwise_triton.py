"""Triton kernels of the masked depthwise convolution: visible tokens in, visible tokens out, no dense grid.

A voxel is a row of C channels; the rows of a token lie together, and tokens that are masked are not there at all. A
table says for every place of the token grid (and a rim around it) which visible token lies there, or -1. Every kernel
looks its neighbours up in it. Sums are float32 (float64 for float64 voxels).

One kernel serves the forward pass and the input gradient, which is the same convolution with the flipped kernel (masked
voxels neither send nor receive). Imported only where Triton is installed; `TRITON_INTERPRET=1` runs it on a CPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 32, 64
"""voxels and channels of one program"""
ROWS_PER_CHUNK = 4096
"""voxels that one program of the weight gradient sums over"""


def slot_table(ids_keep: Tensor, grid: list[int], token: list[int], kernel: int) -> Tensor:
    """Which visible token lies where.

    Args:
        ids_keep: (N, K) int64, raster numbers of visible tokens in `grid`.
        grid: tokens per axis.
        token: voxels of a token per axis.
        kernel: voxels per axis of the convolution.

    Returns:
        (N, gx + 2hx, gy + 2hy, gz + 2hz) int32: n * K + k where token k of view n lies, -1 where there is none; h is
        the rim that the kernel reaches into, in tokens.
    """
    n, k = ids_keep.shape
    rim = rims(token, kernel)
    table = torch.full((n, math.prod(grid)), -1, dtype=torch.int32, device=ids_keep.device)
    slots = torch.arange(n * k, dtype=torch.int32, device=ids_keep.device).reshape(n, k)
    table = table.scatter(1, ids_keep, slots).reshape(n, *grid)
    return torch.nn.functional.pad(table, [r for h in reversed(rim) for r in (h, h)], value=-1)


def rims(token: list[int], kernel: int) -> list[int]:
    """Tokens per axis that the kernel reaches beyond its own."""
    return [math.ceil((kernel // 2) / t) for t in token]


@triton.jit
def _place(rows, ids, K, GY: tl.constexpr, GZ: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr):
    """Row numbers → number of the view, and voxel coordinates in its dense grid."""
    slot = rows // (TX * TY * TZ)
    local = rows % (TX * TY * TZ)
    token = tl.load(ids + slot)
    x = (token // (GY * GZ)) * TX + local // (TY * TZ)
    y = (token // GZ % GY) * TY + local // TZ % TY
    z = (token % GZ) * TZ + local % TZ
    return slot // K, x, y, z


@triton.jit
def _source(
    table, view, x, y, z,
    GX: tl.constexpr, GY: tl.constexpr, GZ: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr,
    HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr,
):  # fmt: skip
    """Row number of a voxel given by its coordinates in the dense grid; negative where it is masked or outside."""
    x, y, z = x + HX * TX, y + HY * TY, z + HZ * TZ
    place = ((view * (GX + 2 * HX) + x // TX) * (GY + 2 * HY) + y // TY) * (GZ + 2 * HZ) + z // TZ
    slot = tl.load(table + place).to(tl.int64)
    inside = ((x % TX) * TY + y % TY) * TZ + z % TZ
    return tl.where(slot < 0, -1, slot * (TX * TY * TZ) + inside)


@triton.jit
def _convolve_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, ids, table, n_rows, K, C,
    GX: tl.constexpr, GY: tl.constexpr, GZ: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr,
    HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr, KERNEL: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_rows, in_channels = rows < n_rows, channels < C
    rows = tl.minimum(rows, n_rows - 1)
    view, x, y, z = _place(rows, ids, K, GY, GZ, TX, TY, TZ)
    total = tl.zeros((ROWS, CHANNELS), SUM)
    if HAS_BIAS:
        total += tl.load(bias_ptr + channels, mask=in_channels, other=0.0).to(SUM)[None, :]
    for i in range(KERNEL):
        for j in range(KERNEL):
            for k in tl.static_range(KERNEL):
                source = _source(
                    table, view, x + i - KERNEL // 2, y + j - KERNEL // 2, z + k - KERNEL // 2,
                    GX, GY, GZ, TX, TY, TZ, HX, HY, HZ,
                )  # fmt: skip
                voxels = tl.load(
                    x_ptr + source[:, None] * C + channels[None, :],
                    mask=(source >= 0)[:, None] & in_channels[None, :], other=0.0,
                )  # fmt: skip
                tap = (i * KERNEL + j) * KERNEL + k
                weight = tl.load(weight_ptr + tap * C + channels, mask=in_channels, other=0.0)
                total += voxels.to(SUM) * weight.to(SUM)[None, :]
    tl.store(
        out_ptr + rows[:, None] * C + channels[None, :], total.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & in_channels[None, :],
    )  # fmt: skip


@triton.jit
def _weight_gradient_kernel(
    x_ptr, grad_ptr, partial_ptr, ids, table, n_rows, K, C,
    GX: tl.constexpr, GY: tl.constexpr, GZ: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr,
    HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr, KERNEL: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, ROWS_PER_CHUNK: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """One tap of the kernel, summed over a chunk of rows: partial (chunks, taps, C)."""
    chunk, tap = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channels < C
    i, j, k = tap // (KERNEL * KERNEL), tap // KERNEL % KERNEL, tap % KERNEL
    total = tl.zeros((ROWS, CHANNELS), SUM)
    for start in range(0, ROWS_PER_CHUNK, ROWS):
        rows = chunk * ROWS_PER_CHUNK + start + tl.arange(0, ROWS)
        in_rows = rows < n_rows
        rows = tl.minimum(rows, n_rows - 1)
        view, x, y, z = _place(rows, ids, K, GY, GZ, TX, TY, TZ)
        source = _source(
            table, view, x + i - KERNEL // 2, y + j - KERNEL // 2, z + k - KERNEL // 2,
            GX, GY, GZ, TX, TY, TZ, HX, HY, HZ,
        )  # fmt: skip
        needed = ((source >= 0) & in_rows)[:, None] & in_channels[None, :]
        voxels = tl.load(x_ptr + source[:, None] * C + channels[None, :], mask=needed, other=0.0)
        grad = tl.load(grad_ptr + rows[:, None] * C + channels[None, :], mask=needed, other=0.0)
        total += voxels.to(SUM) * grad.to(SUM)
    place = partial_ptr + (chunk * (KERNEL * KERNEL * KERNEL) + tap) * C + channels
    tl.store(place, tl.sum(total, axis=0), mask=in_channels)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids_keep: Tensor, table: Tensor, grid: list[int], token: list[int]
) -> Tensor:
    """Masked depthwise convolution of visible tokens.

    Args:
        x: (N, K, x, y, z, C) contiguous, voxels of visible tokens.
        weight: (C, 1, k, k, k).
        bias: (C,) or None.
        ids_keep: (N, K) int64.
        table: from `slot_table`.
        grid, token: tokens per axis, voxels of a token per axis.

    Returns:
        like x.
    """
    kernel, channels = weight.shape[-1], x.shape[-1]
    taps = weight.reshape(channels, -1).t().contiguous()  # (k³, C), so that channels lie together
    out = torch.empty_like(x)
    n_rows = x.numel() // channels
    programs = (triton.cdiv(n_rows, ROWS), triton.cdiv(channels, _channel_block(channels)))
    _convolve_kernel[programs](
        x, taps, taps if bias is None else bias, out, ids_keep, table, n_rows, ids_keep.shape[1], channels,
        *grid, *token, *rims(token, kernel), KERNEL=kernel, HAS_BIAS=bias is not None,
        ROWS=ROWS, CHANNELS=_channel_block(channels), SUM=_sum_type(x)[1],
    )  # fmt: skip
    return out


def weight_gradient(
    x: Tensor, grad: Tensor, ids_keep: Tensor, table: Tensor, grid: list[int], token: list[int], kernel: int
) -> Tensor:
    """Gradient of the weight, (C, 1, k, k, k), float32 or float64.

    Args:
        x, grad: (N, K, x, y, z, C) contiguous, input of `convolve` and the gradient of its result.
        ids_keep, table, grid, token: as in `convolve`.
        kernel: voxels per axis of the convolution.
    """
    channels = x.shape[-1]
    n_rows = x.numel() // channels
    chunks = triton.cdiv(n_rows, ROWS_PER_CHUNK)
    dtype, sum_type = _sum_type(x)
    partial = torch.empty(chunks, kernel**3, channels, dtype=dtype, device=x.device)
    block = _channel_block(channels)
    _weight_gradient_kernel[(chunks, triton.cdiv(channels, block), kernel**3)](
        x, grad, partial, ids_keep, table, n_rows, ids_keep.shape[1], channels,
        *grid, *token, *rims(token, kernel), KERNEL=kernel,
        ROWS=ROWS, CHANNELS=block, ROWS_PER_CHUNK=ROWS_PER_CHUNK, SUM=sum_type,
    )  # fmt: skip
    return partial.sum(dim=0).t().reshape(channels, 1, kernel, kernel, kernel)


def _sum_type(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """What sums are kept in: float32, or float64 where the voxels are."""
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def _channel_block(channels: int) -> int:
    return min(CHANNELS, triton.next_power_of_2(channels))


@torch.library.custom_op("nnunet_mim::masked_depthwise", mutates_args=())
def masked_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, ids_keep: Tensor, table: Tensor, grid: list[int], token: list[int]
) -> Tensor:
    """`convolve` with gradients, seen by torch.compile as one operation."""
    return convolve(x.contiguous(), weight, bias, ids_keep, table, grid, token)


@torch.library.custom_op("nnunet_mim::masked_depthwise_backward", mutates_args=())
def masked_depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ids_keep: Tensor, table: Tensor, grid: list[int], token: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_depthwise`: input, weight, bias."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = convolve(grad, weight.flip(2, 3, 4), None, ids_keep, table, grid, token)
    grad_weight = weight_gradient(x, grad, ids_keep, table, grid, token, weight.shape[-1])
    return grad_x, grad_weight.to(weight.dtype), grad.sum(dim=(0, 1, 2, 3, 4), dtype=_sum_type(x)[0]).to(weight.dtype)


@masked_depthwise.register_fake
def _(x, weight, bias, ids_keep, table, grid, token):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@masked_depthwise_backward.register_fake
def _(grad, x, weight, ids_keep, table, grid, token):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, _, ids_keep, table, ctx.grid, ctx.token = inputs
    ctx.save_for_backward(x, weight, ids_keep, table)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, ids_keep, table = ctx.saved_tensors
    gradients = masked_depthwise_backward(grad, x, weight, ids_keep, table, ctx.grid, ctx.token)
    return *gradients, None, None, None, None


masked_depthwise.register_autograd(_backward, setup_context=_setup_context)
