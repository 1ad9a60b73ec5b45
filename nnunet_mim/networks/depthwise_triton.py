"""Triton kernels of the masked depthwise convolution: visible tokens in, visible tokens out, no dense grid.

A voxel is a row of C channels, and the rows of a visible token lie together. A table says which visible token lies at
each place of the token grid and of a rim around it, or -1. The kernels look their neighbours up in it. Sums are float32
(float64 for float64 voxels). One kernel serves the forward pass and the input gradient, which is the same convolution
with the flipped kernel.

Names in the kernels: GX, GY, GZ tokens per axis of the grid; TX, TY, TZ voxels per axis of a token; HX, HY, HZ tokens
per axis of the rim. Only kernels may have more than eight parameters: Triton passes no structures.
Imported only where Triton is installed; `TRITON_INTERPRET=1` runs the kernels on a CPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_mim.errors import MiMError

LINES, CHANNELS, WARPS = 32, 32, 4
"""lines of voxels, channels and warps of one program; benchmarks/gpu/depthwise_tiles.py tries others"""
LONGEST_LINE = 8
"""maximum voxels along z whose sums one thread keeps"""
SECTOR = 16
"""half-precision channels in a memory sector of 32 bytes"""
LINES_PER_CHUNK = 1024
"""lines that a program of the weight gradient sums over"""


def slot_table(ids_keep: Tensor, grid: list[int], token: list[int], kernel: int) -> Tensor:
    """Make the table of the visible tokens.

    Args:
        ids_keep: (N, K) int64, raster numbers of the visible tokens.
        grid: tokens per axis.
        token: voxels of a token per axis.
        kernel: voxels per axis of the convolution.

    Returns:
        (N, gx + 2hx, gy + 2hy, gz + 2hz) int32 with h = `rims`: n * K + k where visible token k of view n lies, -1
        elsewhere.
    """
    N, K = ids_keep.shape
    rim = rims(token, kernel)
    table = torch.full((N, math.prod(grid)), -1, dtype=torch.int32, device=ids_keep.device)
    slots = torch.arange(N * K, dtype=torch.int32, device=ids_keep.device).reshape(N, K)
    table = table.scatter(1, ids_keep, slots).reshape(N, *grid)
    return torch.nn.functional.pad(table, [r for h in reversed(rim) for r in (h, h)], value=-1)


def rims(token: list[int], kernel: int) -> list[int]:
    """Number of tokens per axis that the kernel reaches beyond a token."""
    return [math.ceil((kernel // 2) / t) for t in token]


@triton.jit
def _place(rows, ids, K, GY: tl.constexpr, GZ: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr):
    """Row numbers → number of the view, and coordinates of the voxel in its dense grid."""
    slot = rows // (TX * TY * TZ)
    local = rows % (TX * TY * TZ)
    token = tl.load(ids + slot).to(tl.int32)
    x = (token // (GY * GZ)) * TX + local // (TY * TZ)
    y = (token // GZ % GY) * TY + local // TZ % TY
    z = (token % GZ) * TZ + local % TZ
    return slot // K, x, y, z


@triton.jit
def _column(
    view, x, y, GX: tl.constexpr, GY: tl.constexpr, GZ: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr,
    HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr,
):  # fmt: skip
    """Coordinates in the dense grid → where their column begins in the table, and the column's number in its token."""
    x, y = x + HX * TX, y + HY * TY
    place = ((view * (GX + 2 * HX) + x // TX) * (GY + 2 * HY) + y // TY) * (GZ + 2 * HZ)
    return place, (x % TX) * TY + y % TY


@triton.jit
def _load_voxels(
    x_ptr, table, place, column, z, C, channels, wanted,
    TXYZ: tl.constexpr, TZ: tl.constexpr, HZ: tl.constexpr,
):  # fmt: skip
    """Load the voxels at height z of columns; zero where masked, outside, or not wanted."""
    z = z + HZ * TZ
    slot = tl.load(table + place + z // TZ)
    row = slot * TXYZ + column * TZ + z % TZ
    return tl.load(
        x_ptr + row.to(tl.int64)[:, None] * C + channels[None, :], mask=(slot >= 0)[:, None] & wanted, other=0.0
    )


@triton.jit
def _add_at(sums, m: tl.constexpr, value):
    """Add `value` to tensor m of a tuple."""
    return sums[:m] + (sums[m] + value,) + sums[m + 1 :]


@triton.jit
def _convolve_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, ids, table, n_lines, K, C,
    GX: tl.constexpr, GY: tl.constexpr, GZ: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr,
    HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr, KERNEL: tl.constexpr, HAS_BIAS: tl.constexpr,
    LINE: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Convolve LINES lines of LINE voxels along z; a voxel is loaded once for all sums that it goes into."""
    lines = tl.program_id(0) * LINES + tl.arange(0, LINES)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channels < C
    wanted = (lines < n_lines)[:, None] & in_channels[None, :]
    view, x, y, z = _place(tl.minimum(lines, n_lines - 1) * LINE, ids, K, GY, GZ, TX, TY, TZ)
    zero = tl.zeros((LINES, CHANNELS), SUM)
    if HAS_BIAS:
        zero += tl.load(bias_ptr + channels, mask=in_channels, other=0.0).to(SUM)[None, :]
    sums = (zero,) * LINE
    for ij in range(KERNEL * KERNEL):
        place, column = _column(
            view, x + ij // KERNEL - KERNEL // 2, y + ij % KERNEL - KERNEL // 2, GX, GY, GZ, TX, TY, HX, HY, HZ
        )
        for n in tl.static_range(LINE + KERNEL - 1):
            voxels = _load_voxels(
                x_ptr, table, place, column, z + (n - KERNEL // 2), C, channels, wanted, TX * TY * TZ, TZ, HZ
            ).to(SUM)
            for k in tl.static_range(KERNEL):
                if n - k >= 0 and n - k < LINE:  # constants: decided when the kernel is compiled
                    weight = tl.load(weight_ptr + (ij * KERNEL + k) * C + channels, mask=in_channels, other=0.0)
                    sums = _add_at(sums, n - k, voxels * weight.to(SUM)[None, :])
    out = out_ptr + (lines * LINE).to(tl.int64)[:, None] * C + channels[None, :]
    for m in tl.static_range(LINE):
        tl.store(out + m * C, sums[m].to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def _weight_gradient_kernel(
    x_ptr, grad_ptr, partial_ptr, ids, table, n_lines, K, C,
    GX: tl.constexpr, GY: tl.constexpr, GZ: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr,
    HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr, KERNEL: tl.constexpr,
    LINE: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr, LINES_PER_CHUNK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of taps (i, j, 0…KERNEL-1) over a chunk of lines: partial (chunks, taps, C).

    Programs with neighbouring numbers share a chunk, which therefore stays in the cache for all (i, j).
    """
    chunk, ij = tl.program_id(0) // (KERNEL * KERNEL), tl.program_id(0) % (KERNEL * KERNEL)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channels < C
    shift_x, shift_y = ij // KERNEL - KERNEL // 2, ij % KERNEL - KERNEL // 2
    sums = (tl.zeros((LINES, CHANNELS), SUM),) * KERNEL
    for start in range(0, LINES_PER_CHUNK, LINES):
        lines = chunk * LINES_PER_CHUNK + start + tl.arange(0, LINES)
        wanted = (lines < n_lines)[:, None] & in_channels[None, :]
        lines = tl.minimum(lines, n_lines - 1)
        view, x, y, z = _place(lines * LINE, ids, K, GY, GZ, TX, TY, TZ)
        place, column = _column(view, x + shift_x, y + shift_y, GX, GY, GZ, TX, TY, HX, HY, HZ)
        grads = grad_ptr + (lines * LINE).to(tl.int64)[:, None] * C + channels[None, :]
        voxels = ()
        for n in tl.static_range(LINE + KERNEL - 1):
            voxels = voxels + (  # type: ignore[assignment]
                _load_voxels(
                    x_ptr, table, place, column, z + (n - KERNEL // 2), C, channels, wanted, TX * TY * TZ, TZ, HZ
                ),
            )
        for m in tl.static_range(LINE):
            grad = tl.load(grads + m * C, mask=wanted, other=0.0).to(SUM)
            for k in tl.static_range(KERNEL):
                sums = _add_at(sums, k, grad * voxels[m + k].to(SUM))
    out = partial_ptr + tl.program_id(0).to(tl.int64) * KERNEL * C + channels  # programs are numbered as partial is
    for k in tl.static_range(KERNEL):
        tl.store(out + k * C, tl.sum(sums[k], axis=0), mask=in_channels)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids_keep: Tensor, table: Tensor, grid: list[int], token: list[int]
) -> Tensor:
    """Masked depthwise convolution of visible tokens.

    Args:
        x: (N, K, X, Y, Z, C) contiguous, voxels of the visible tokens.
        weight: (C, 1, k, k, k).
        bias: (C,) or None.
        ids_keep, table, grid, token: as in `slot_table`, and its result.

    Returns:
        (N, K, X, Y, Z, C).
    """
    kernel, channels = weight.shape[-1], x.shape[-1]
    taps = weight.reshape(channels, -1).t().contiguous()  # (k³, C), so that channels lie together
    out = torch.empty_like(x)
    line, n_lines = _lines(x)
    programs = (triton.cdiv(n_lines, LINES), triton.cdiv(channels, _channel_block(channels)))
    with torch.cuda.device_of(x):
        _convolve_kernel[programs](
            x, taps, taps if bias is None else bias, out, ids_keep, table, n_lines, ids_keep.shape[1], channels,
            *grid, *token, *rims(token, kernel), KERNEL=kernel, HAS_BIAS=bias is not None,
            LINE=line, LINES=LINES, CHANNELS=_channel_block(channels), SUM=_sum_type(x)[1], num_warps=WARPS,
        )  # fmt: skip
    return out


def weight_gradient(
    x: Tensor, grad: Tensor, ids_keep: Tensor, table: Tensor, grid: list[int], token: list[int], kernel: int
) -> Tensor:
    """Gradient of the weight, (C, 1, k, k, k), float32 or float64.

    Args:
        x, grad: (N, K, X, Y, Z, C) contiguous, input of `convolve` and gradient of its result.
        ids_keep, table, grid, token: as in `convolve`.
        kernel: voxels per axis of the convolution.
    """
    channels = x.shape[-1]
    line, n_lines = _lines(x)
    chunks = triton.cdiv(n_lines, LINES_PER_CHUNK)
    dtype, sum_type = _sum_type(x)
    partial = torch.empty(chunks, kernel**3, channels, dtype=dtype, device=x.device)
    block = _channel_block(channels)
    with torch.cuda.device_of(x):
        _weight_gradient_kernel[(chunks * kernel**2, triton.cdiv(channels, block))](
            x, grad, partial, ids_keep, table, n_lines, ids_keep.shape[1], channels,
            *grid, *token, *rims(token, kernel), KERNEL=kernel,
            LINE=line, LINES=LINES, CHANNELS=block, LINES_PER_CHUNK=LINES_PER_CHUNK, SUM=sum_type, num_warps=WARPS,
        )  # fmt: skip
    return partial.sum(dim=0).t().contiguous().reshape(channels, 1, kernel, kernel, kernel)


def _sum_type(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """Type of the sums: float32, or float64 for float64 voxels."""
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def _channel_block(channels: int) -> int:
    """Number of channels of one program: a power of two that divides them, if one fills at least a memory sector."""
    divisor = channels & -channels
    return min(CHANNELS, divisor if divisor >= SECTOR else triton.next_power_of_2(channels))


def _lines(x: Tensor) -> tuple[int, int]:
    """Number of voxels of a line, a divisor of the token's along z, and number of lines."""
    line = max(n for n in range(1, LONGEST_LINE + 1) if x.shape[4] % n == 0)
    n_voxels = x.numel() // x.shape[-1]
    if n_voxels >= 2**31:  # the kernels count in 32 bits
        raise MiMError(f"{n_voxels} voxels in one pass are too many: lower --views_per_pass")
    return line, n_voxels // line


@torch.library.custom_op("nnunet_mim::masked_depthwise", mutates_args=())
def masked_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, ids_keep: Tensor, table: Tensor, grid: list[int], token: list[int]
) -> Tensor:
    """`convolve` with gradients, as one operation for torch.compile."""
    return convolve(x.contiguous(), weight, bias, ids_keep.contiguous(), table, grid, token)


@torch.library.custom_op("nnunet_mim::masked_depthwise_backward", mutates_args=())
def masked_depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ids_keep: Tensor, table: Tensor, grid: list[int], token: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_depthwise` with respect to x, weight and bias."""
    grad, x, ids_keep = grad.contiguous(), x.contiguous(), ids_keep.contiguous()
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
