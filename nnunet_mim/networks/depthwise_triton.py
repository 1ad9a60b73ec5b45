"""Triton kernels of the masked depthwise convolution: visible tokens in, visible tokens out, no dense grid.

A voxel is a row of C channels, and the rows of a visible token lie together. Tokens of several views lie in any order,
and a view may have any number of them. A table says which visible token lies at each place of the token grids and of a
rim around them, or -1. The kernels look their neighbours up in it. Sums are float32 (float64 for float64 voxels). One
kernel serves the forward pass and the input gradient, which is the same convolution with the flipped kernel.

Names in the kernels: GX, GY, GZ tokens per axis of the grid; TX, TY, TZ voxels per axis of a token; HX, HY, HZ tokens
per axis of the rim; a line is LINE voxels of a token along z. What is known before a launch is a constant, so that
Triton divides by shifts and loads many channels at once. Only kernels may have more than eight parameters: Triton
passes no structures. Imported only where Triton is installed; `TRITON_INTERPRET=1` runs the kernels on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_mim.errors import MiMError

ROWS, WIDTH, WARPS = 128, 8, 4
"""rows, channels of a row, and warps of a program of the convolution; benchmarks/gpu/depthwise_tiles.py tries others"""
CHANNELS = 32
"""maximum channels of a program of the weight gradient, which has as many voxels in all as one of the convolution"""
LONGEST_LINE = 8
"""maximum voxels along z whose sums one thread keeps"""
SECTOR = 16
"""half-precision channels in a memory sector of 32 bytes"""
LINES_PER_CHUNK = 1024
"""lines that a program of the weight gradient sums over"""


def slot_table(ids: Tensor, view: Tensor, n_views: int, grid: list[int], token: list[int], kernel: int) -> Tensor:
    """Make the table of the visible tokens.

    Args:
        ids: (T,) int64, raster number of each visible token in the grid of its view.
        view: (T,) int32 or int64, number of the view of each token.
        n_views: number of views.
        grid: tokens per axis.
        token: voxels of a token per axis.
        kernel: voxels per axis of the convolution.

    Returns:
        (n_views, gx + 2hx, gy + 2hy, gz + 2hz) int32 with h = `rims`: t where visible token t lies, -1 elsewhere.
    """
    rim = rims(token, kernel)
    n_places = math.prod(grid)
    table = torch.full((n_views * n_places,), -1, dtype=torch.int32, device=ids.device)
    table = table.scatter(0, view * n_places + ids, torch.arange(len(ids), dtype=torch.int32, device=ids.device))
    table = table.reshape(n_views, *grid)
    return torch.nn.functional.pad(table, [r for h in reversed(rim) for r in (h, h)], value=-1)


def rims(token: list[int], kernel: int) -> list[int]:
    """Number of tokens per axis that the kernel reaches beyond a token."""
    return [math.ceil((kernel // 2) / t) for t in token]


@triton.jit
def _place(
    lines, ids, views, GY: tl.constexpr, GZ: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr,
    LINE: tl.constexpr,
):  # fmt: skip
    """Numbers of lines → number of the view, and coordinates of the first voxel in its dense grid."""
    rows = lines * LINE
    slot = rows // (TX * TY * TZ)
    local = rows % (TX * TY * TZ)
    token = tl.load(ids + slot).to(tl.int32)
    x = (token // (GY * GZ)) * TX + local // (TY * TZ)
    y = (token // GZ % GY) * TY + local // TZ % TY
    z = (token % GZ) * TZ + local % TZ
    return tl.load(views + slot).to(tl.int32), x, y, z


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
def _line_in_column(table, place, column, z, TXYZ: tl.constexpr, TZ: tl.constexpr, HZ: tl.constexpr):
    """Height of the first voxel of a line in columns → its row, and whether the line is visible."""
    z = z + HZ * TZ
    slot = tl.load(table + place + z // TZ)
    return slot * TXYZ + column * TZ + z % TZ, slot >= 0


@triton.jit
def _add_at(sums, m: tl.constexpr, value):
    """Add `value` to tensor m of a tuple."""
    return sums[:m] + (sums[m] + value,) + sums[m + 1 :]


@triton.jit(do_not_specialize=["n_rows"])
def _convolve_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, ids, views, table, n_rows, C: tl.constexpr,
    GX: tl.constexpr, GY: tl.constexpr, GZ: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr,
    HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr, KERNEL: tl.constexpr, FLIP: tl.constexpr,
    HAS_BIAS: tl.constexpr, LINE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Convolve lines along z; a voxel is loaded once for all sums that it goes into.

    A row is WIDTH of the channels of a line. WIDTH divides C, so that any number of channels leaves no thread idle.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = (rows < n_rows)[:, None]
    rows = tl.minimum(rows, n_rows - 1)
    lines = rows // (C // WIDTH)
    channels = (rows % (C // WIDTH) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    view, x, y, z = _place(lines, ids, views, GY, GZ, TX, TY, TZ, LINE)
    zero = tl.zeros((ROWS, WIDTH), SUM)
    if HAS_BIAS:
        zero += tl.load(bias_ptr + channels).to(SUM)
    sums = (zero,) * LINE
    for ij in range(KERNEL * KERNEL):
        place, column = _column(
            view, x + ij // KERNEL - KERNEL // 2, y + ij % KERNEL - KERNEL // 2, GX, GY, GZ, TX, TY, HX, HY, HZ
        )
        weights = weight_ptr + (KERNEL * KERNEL - 1 - ij if FLIP else ij) * KERNEL * C + channels
        for n in tl.static_range(LINE + KERNEL - 1):
            # constants: conditions are decided when the kernel is compiled
            if n == 0 or (n - KERNEL // 2) % LINE == 0:  # the voxel begins another line, perhaps of another token
                first = z + (n - KERNEL // 2) // LINE * LINE
                row, visible = _line_in_column(table, place, column, first, TX * TY * TZ, TZ, HZ)
                voxels = x_ptr + row.to(tl.int64)[:, None] * C + channels
            offset = (n - KERNEL // 2) % LINE * C
            voxel = tl.load(voxels + offset, mask=visible[:, None], other=0.0).to(SUM)
            for k in tl.static_range(KERNEL):
                if n - k >= 0 and n - k < LINE:
                    weight = tl.load(weights + (KERNEL - 1 - k if FLIP else k) * C).to(SUM)
                    sums = _add_at(sums, n - k, voxel * weight)
    out = out_ptr + (lines * LINE).to(tl.int64)[:, None] * C + channels
    for m in tl.static_range(LINE):
        tl.store(out + m * C, sums[m].to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["n_lines"])
def _weight_gradient_kernel(
    x_ptr, grad_ptr, partial_ptr, ids, views, table, n_lines, C: tl.constexpr,
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
        view, x, y, z = _place(lines, ids, views, GY, GZ, TX, TY, TZ, LINE)
        place, column = _column(view, x + shift_x, y + shift_y, GX, GY, GZ, TX, TY, HX, HY, HZ)
        first_grads = grad_ptr + (lines * LINE).to(tl.int64)[:, None] * C + channels[None, :]
        grads = ()
        for m in tl.static_range(LINE):
            grads = grads + (tl.load(first_grads + m * C, mask=wanted, other=0.0),)  # type: ignore[assignment]
        for n in tl.static_range(LINE + KERNEL - 1):
            if n == 0 or (n - KERNEL // 2) % LINE == 0:
                first = z + (n - KERNEL // 2) // LINE * LINE
                row, visible = _line_in_column(table, place, column, first, TX * TY * TZ, TZ, HZ)
                voxels = x_ptr + row.to(tl.int64)[:, None] * C + channels[None, :]
                there = visible[:, None] & in_channels[None, :]
            voxel = tl.load(voxels + (n - KERNEL // 2) % LINE * C, mask=there, other=0.0).to(SUM)
            for k in tl.static_range(KERNEL):
                if n - k >= 0 and n - k < LINE:
                    sums = _add_at(sums, k, grads[n - k].to(SUM) * voxel)
    out = partial_ptr + tl.program_id(0).to(tl.int64) * KERNEL * C + channels  # programs are numbered as partial is
    for k in tl.static_range(KERNEL):
        tl.store(out + k * C, tl.sum(sums[k], axis=0), mask=in_channels)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, view: Tensor, table: Tensor, grid: list[int],
    token: list[int], flip: bool = False,
) -> Tensor:  # fmt: skip
    """Masked depthwise convolution of visible tokens.

    Args:
        x: (T, X, Y, Z, C) contiguous, voxels of the visible tokens.
        weight: (C, 1, k, k, k).
        bias: (C,) or None.
        ids, view, table, grid, token: as in `slot_table`, and its result.
        flip: convolve with the flipped kernel.

    Returns:
        (T, X, Y, Z, C).
    """
    channels = x.shape[-1]
    taps = weight.reshape(channels, -1).t().contiguous()  # (k³, C), so that channels lie together
    out = torch.empty_like(x)
    constants = convolution_constants(x, grid, token, weight.shape[-1])
    n_rows = _count(x, constants["LINE"] * constants["WIDTH"])
    with torch.cuda.device_of(x):
        _convolve_kernel[(triton.cdiv(n_rows, ROWS),)](
            x, taps, taps if bias is None else bias, out, ids, view, table, n_rows,
            **constants, FLIP=flip, HAS_BIAS=bias is not None, num_warps=WARPS,
        )  # fmt: skip
    return out


def weight_gradient(
    x: Tensor, grad: Tensor, ids: Tensor, view: Tensor, table: Tensor, grid: list[int], token: list[int], kernel: int
) -> Tensor:
    """Gradient of the weight, (C, 1, k, k, k), float32 or float64.

    Args:
        x, grad: (T, X, Y, Z, C) contiguous, input of `convolve` and gradient of its result.
        ids, view, table, grid, token: as in `convolve`.
        kernel: voxels per axis of the convolution.
    """
    channels = x.shape[-1]
    constants = gradient_constants(x, grid, token, kernel)
    n_lines = _count(x, constants["LINE"] * channels)
    chunks = triton.cdiv(n_lines, LINES_PER_CHUNK)
    partial = torch.empty(chunks, kernel**3, channels, dtype=_sum_type(x), device=x.device)
    with torch.cuda.device_of(x):
        _weight_gradient_kernel[(chunks * kernel**2, triton.cdiv(channels, constants["CHANNELS"]))](
            x, grad, partial, ids, view, table, n_lines, **constants, num_warps=WARPS
        )
    return partial.sum(dim=0).t().contiguous().reshape(channels, 1, kernel, kernel, kernel)


def convolution_constants(x: Tensor, grid: list[int], token: list[int], kernel: int) -> dict[str, Any]:
    """Constants of `_convolve_kernel` but FLIP and HAS_BIAS; arguments as in `convolve` and `weight_gradient`."""
    width = min(WIDTH, _power_of_two_in(x.shape[-1]))
    return _constants(x, grid, token, kernel) | {"ROWS": ROWS, "WIDTH": width}


def gradient_constants(x: Tensor, grid: list[int], token: list[int], kernel: int) -> dict[str, Any]:
    """Constants of `_weight_gradient_kernel`; arguments as there.

    A program's channels are a power of two that divides them, if one fills at least a memory sector.
    """
    channels = x.shape[-1]
    divisor = _power_of_two_in(channels)
    block = min(CHANNELS, divisor if divisor >= SECTOR else triton.next_power_of_2(channels))
    lines = min(ROWS * WIDTH // block, LINES_PER_CHUNK)
    constants = _constants(x, grid, token, kernel)
    return constants | {"LINES": lines, "CHANNELS": block, "LINES_PER_CHUNK": LINES_PER_CHUNK}


def _constants(x: Tensor, grid: list[int], token: list[int], kernel: int) -> dict[str, Any]:
    """Constants of both kernels."""
    axes = {"G": grid, "T": token, "H": rims(token, kernel)}
    sizes = {name + axis: size for name, three in axes.items() for axis, size in zip("XYZ", three, strict=True)}
    line = max(n for n in range(1, LONGEST_LINE + 1) if token[2] % n == 0)
    sums = tl.float64 if x.dtype == torch.float64 else tl.float32
    return sizes | {"C": x.shape[-1], "KERNEL": kernel, "LINE": line, "SUM": sums}


def _sum_type(x: Tensor) -> torch.dtype:
    """Type of the sums: float32, or float64 for float64 voxels."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _power_of_two_in(channels: int) -> int:
    """Largest power of two that divides a number of channels."""
    return channels & -channels


def _count(x: Tensor, size: int) -> int:
    """Number of pieces of `size` values in x."""
    n_voxels, pieces = x.numel() // x.shape[-1], x.numel() // size
    if max(n_voxels, pieces) >= 2**31:  # the kernels count in 32 bits
        remedy = "in mim_pretrain lower --views_per_pass, in finetuning the patch size of the plans"
        raise MiMError(f"{n_voxels} voxels in one pass are too many: {remedy}")
    return pieces


@torch.library.custom_op("nnunet_mim::masked_depthwise", mutates_args=())
def masked_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, view: Tensor, table: Tensor, grid: list[int], token: list[int]
) -> Tensor:
    """`convolve` with gradients, as one operation for torch.compile."""
    return convolve(x.contiguous(), weight, bias, ids.contiguous(), view.contiguous(), table, grid, token)


@torch.library.custom_op("nnunet_mim::masked_depthwise_backward", mutates_args=())
def masked_depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ids: Tensor, view: Tensor, table: Tensor, grid: list[int],
    token: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `masked_depthwise` with respect to x, weight and bias."""
    grad, x = grad.contiguous(), x.contiguous()
    tokens = ids.contiguous(), view.contiguous(), table, grid, token
    grad_x = convolve(grad, weight, None, *tokens, flip=True)
    grad_weight = weight_gradient(x, grad, *tokens, weight.shape[-1])
    return grad_x, grad_weight.to(weight.dtype), grad.sum(dim=(0, 1, 2, 3), dtype=_sum_type(x)).to(weight.dtype)


@masked_depthwise.register_fake
def _(x, weight, bias, ids, view, table, grid, token):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@masked_depthwise_backward.register_fake
def _(grad, x, weight, ids, view, table, grid, token):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, _, ids, view, table, ctx.grid, ctx.token = inputs
    ctx.save_for_backward(x, weight, ids, view, table)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, *tokens = ctx.saved_tensors
    gradients = masked_depthwise_backward(grad, x, weight, *tokens, ctx.grid, ctx.token)
    return *gradients, None, None, None, None, None


masked_depthwise.register_autograd(_backward, setup_context=_setup_context)
