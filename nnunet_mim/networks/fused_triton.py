"""Triton kernels of what lies between matrix products: bias and GELU; addition and LayerNorm; bias, LayerNorm and GELU.

Each reads and writes a row once where PyTorch's operations do so two or three times, and sums the gradients of biases
and of LayerNorm's weights on the way. Sums are float32. A row is the C channels of a voxel or token.
Imported only where Triton is installed; `TRITON_INTERPRET=1` runs the kernels on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""elements of a tile of a program, at most: 16 of a thread. With 4096 the oldest Triton takes 255 registers of 255"""
COLUMNS = 128
"""channels of a program of bias and GELU"""
PROGRAMS = 1024
"""programs that share the rows of a backward pass, at most; each leaves one row of partial sums"""
RSQRT_2, RSQRT_2_PI = tl.constexpr(0.7071067811865476), tl.constexpr(0.3989422804014327)


@triton.jit
def _bias_gelu_kernel(x_ptr, bias_ptr, out_ptr, n_rows, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = GELU(x + bias), tile by tile."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < C)[None, :]
    place = rows.to(tl.int64)[:, None] * C + columns[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    y = 0.5 * x * (1 + tl.math.erf(x * RSQRT_2))
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, grad_x_ptr, partial_ptr, n_rows, tiles, C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and its sum over the rows of `tiles` tiles, which is a part of the bias's: (programs, C)."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for tile in range(tiles):
        rows = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (columns < C)[None, :]
        place = rows.to(tl.int64)[:, None] * C + columns[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        slope = 0.5 * (1 + tl.math.erf(x * RSQRT_2)) + x * RSQRT_2_PI * tl.exp(-0.5 * x * x)
        grad_x = grad * slope
        tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        total += tl.sum(grad_x, axis=0)
    tl.store(partial_ptr + tl.program_id(0) * C + columns, total, mask=columns < C)


@triton.jit
def _add_norm_kernel(
    x_ptr, branch_ptr, bias_ptr, weight_ptr, shift_ptr, sum_ptr, out_ptr, mean_ptr, scale_ptr, n_rows, eps,
    C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """sum = x + branch + bias, out = LayerNorm(sum), and of each row its mean and 1 / standard deviation."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    inside = (rows < n_rows)[:, None] & (columns < C)[None, :]
    place = rows.to(tl.int64)[:, None] * C + columns[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(branch_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    rounded = x.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + place, rounded, mask=inside)
    x = tl.where(inside, rounded.to(tl.float32), 0.0)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    y = centred * scale[:, None] * weight[None, :] + shift[None, :]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(scale_ptr + rows, scale, mask=rows < n_rows)


@triton.jit
def _add_norm_backward_kernel(
    grad_sum_ptr, grad_out_ptr, sum_ptr, weight_ptr, mean_ptr, scale_ptr, grad_ptr, partial_ptr, n_rows, tiles,
    C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of the sum; and sums over the rows of `tiles` tiles, parts of the gradients of bias, weight and shift:
    (programs, 3, C).
    """
    columns = tl.arange(0, CHANNELS)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    of_bias, of_weight, of_shift = (tl.zeros((CHANNELS,), tl.float32),) * 3
    for tile in range(tiles):
        rows = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (columns < C)[None, :]
        place = rows.to(tl.int64)[:, None] * C + columns[None, :]
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        scale = tl.load(scale_ptr + rows, mask=rows < n_rows, other=0.0)
        x = tl.load(sum_ptr + place, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, (x - mean[:, None]) * scale[:, None], 0.0)  # normalised
        grad_out = tl.load(grad_out_ptr + place, mask=inside, other=0.0).to(tl.float32)
        of_weight += tl.sum(grad_out * x, axis=0)
        of_shift += tl.sum(grad_out, axis=0)
        grad_out *= weight[None, :]
        along = tl.sum(grad_out * x, axis=1) / C
        level = tl.sum(grad_out, axis=1) / C
        grad = (grad_out - level[:, None] - x * along[:, None]) * scale[:, None]
        grad += tl.load(grad_sum_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=inside)
        of_bias += tl.sum(tl.where(inside, grad, 0.0), axis=0)
    partial = partial_ptr + tl.program_id(0) * 3 * C + columns
    tl.store(partial, of_bias, mask=columns < C)
    tl.store(partial + C, of_weight, mask=columns < C)
    tl.store(partial + 2 * C, of_shift, mask=columns < C)


@triton.jit
def _norm_gelu_kernel(
    x_ptr, bias_ptr, weight_ptr, shift_ptr, out_ptr, mean_ptr, scale_ptr, n_rows, eps,
    C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = GELU(LayerNorm(x + bias)), and of each row of x + bias its mean and 1 / standard deviation."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    inside = (rows < n_rows)[:, None] & (columns < C)[None, :]
    place = rows.to(tl.int64)[:, None] * C + columns[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    y = centred * scale[:, None] * weight[None, :] + shift[None, :]
    y = 0.5 * y * (1 + tl.math.erf(y * RSQRT_2))
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(scale_ptr + rows, scale, mask=rows < n_rows)


@triton.jit
def _norm_gelu_backward_kernel(
    grad_out_ptr, x_ptr, bias_ptr, weight_ptr, shift_ptr, mean_ptr, scale_ptr, grad_ptr, partial_ptr, n_rows, tiles,
    C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of x; and sums over the rows of `tiles` tiles, parts of the gradients of bias, weight and shift:
    (programs, 3, C).
    """
    columns = tl.arange(0, CHANNELS)
    bias = tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    of_bias, of_weight, of_shift = (tl.zeros((CHANNELS,), tl.float32),) * 3
    for tile in range(tiles):
        rows = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (columns < C)[None, :]
        place = rows.to(tl.int64)[:, None] * C + columns[None, :]
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        scale = tl.load(scale_ptr + rows, mask=rows < n_rows, other=0.0)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        x = tl.where(inside, (x - mean[:, None]) * scale[:, None], 0.0)  # normalised
        y = x * weight[None, :] + shift[None, :]
        slope = 0.5 * (1 + tl.math.erf(y * RSQRT_2)) + y * RSQRT_2_PI * tl.exp(-0.5 * y * y)
        grad_out = tl.load(grad_out_ptr + place, mask=inside, other=0.0).to(tl.float32) * slope
        of_weight += tl.sum(grad_out * x, axis=0)
        of_shift += tl.sum(grad_out, axis=0)
        grad_out *= weight[None, :]
        along = tl.sum(grad_out * x, axis=1) / C
        level = tl.sum(grad_out, axis=1) / C
        grad = (grad_out - level[:, None] - x * along[:, None]) * scale[:, None]
        tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=inside)
        of_bias += tl.sum(tl.where(inside, grad, 0.0), axis=0)
    partial = partial_ptr + tl.program_id(0) * 3 * C + columns
    tl.store(partial, of_bias, mask=columns < C)
    tl.store(partial + C, of_weight, mask=columns < C)
    tl.store(partial + 2 * C, of_shift, mask=columns < C)


def _tiles(n_rows: int, rows: int) -> tuple[int, int]:
    """Number of programs of a backward pass, and of tiles of each."""
    n_tiles = triton.cdiv(n_rows, rows)
    each = triton.cdiv(n_tiles, PROGRAMS)
    return triton.cdiv(n_tiles, each), each


def _rows_of_norm(channels: int) -> tuple[int, int]:
    """Rows of a tile, and channels filled up to a power of two, for LayerNorm."""
    width = triton.next_power_of_2(channels)
    return max(1, min(32, TILE // width)), width


@torch.library.custom_op("nnunet_mim::bias_gelu", mutates_args=())
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias): (..., C) and (C,) → (..., C)."""
    x = x.contiguous()
    out, C = torch.empty_like(x), x.shape[-1]
    n_rows, rows = x.numel() // C, TILE // COLUMNS
    with torch.cuda.device_of(x):
        _bias_gelu_kernel[(triton.cdiv(n_rows, rows), triton.cdiv(C, COLUMNS))](
            x, bias, out, n_rows, C=C, ROWS=rows, COLUMNS=COLUMNS
        )
    return out


@torch.library.custom_op("nnunet_mim::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `bias_gelu` with respect to x and bias."""
    grad, x = grad.contiguous(), x.contiguous()
    C, n_rows, rows = x.shape[-1], x.numel() // x.shape[-1], TILE // COLUMNS
    programs, tiles = _tiles(n_rows, rows)
    grad_x, partial = torch.empty_like(x), x.new_empty((programs, C), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _bias_gelu_backward_kernel[(programs, triton.cdiv(C, COLUMNS))](
            grad, x, bias, grad_x, partial, n_rows, tiles, C=C, ROWS=rows, COLUMNS=COLUMNS
        )
    return grad_x, partial.sum(dim=0).to(bias.dtype)


@torch.library.custom_op("nnunet_mim::add_norm", mutates_args=())
def add_norm(
    x: Tensor, branch: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add a branch and its bias to a residual stream, and normalise the sum.

    Args:
        x, branch: (..., C).
        bias: (C,) of the branch.
        weight, shift: (C,) of the LayerNorm.
        eps: of the LayerNorm.

    Returns:
        the sum and its LayerNorm, (..., C); and mean and 1 / standard deviation of each row, float32.
    """
    x, branch = x.contiguous(), branch.contiguous()
    C = x.shape[-1]
    n_rows, (rows, width) = x.numel() // C, _rows_of_norm(C)
    total, out = torch.empty_like(x), torch.empty_like(x)
    mean, scale = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(x):
        _add_norm_kernel[(triton.cdiv(n_rows, rows),)](
            x, branch, bias, weight, shift, total, out, mean, scale, n_rows, eps, C=C, ROWS=rows, CHANNELS=width
        )
    return total, out, mean, scale


@torch.library.custom_op("nnunet_mim::add_norm_backward", mutates_args=())
def add_norm_backward(
    grad_sum: Tensor, grad_out: Tensor, total: Tensor, weight: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `add_norm`.

    Returns:
        (..., C), that of x and of the branch; and (3, C), those of bias, weight and shift.
    """
    grad_sum, grad_out, C = grad_sum.contiguous(), grad_out.contiguous(), total.shape[-1]
    n_rows, (rows, width) = total.numel() // C, _rows_of_norm(C)
    programs, tiles = _tiles(n_rows, rows)
    grad, partial = torch.empty_like(total), total.new_empty((programs, 3, C), dtype=torch.float32)
    with torch.cuda.device_of(total):
        _add_norm_backward_kernel[(programs,)](
            grad_sum, grad_out, total, weight, mean, scale, grad, partial, n_rows, tiles, C=C, ROWS=rows, CHANNELS=width
        )
    return grad, partial.sum(dim=0).to(weight.dtype)


@torch.library.custom_op("nnunet_mim::norm_gelu", mutates_args=())
def norm_gelu(x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """GELU(LayerNorm(x + bias)), (..., C); and mean and 1 / standard deviation of rows. Arguments as in `add_norm`."""
    x, C = x.contiguous(), x.shape[-1]
    n_rows, (rows, width) = x.numel() // C, _rows_of_norm(C)
    out, mean, scale = torch.empty_like(x), *(x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(x):
        _norm_gelu_kernel[(triton.cdiv(n_rows, rows),)](
            x, bias, weight, shift, out, mean, scale, n_rows, eps, C=C, ROWS=rows, CHANNELS=width
        )
    return out, mean, scale


@torch.library.custom_op("nnunet_mim::norm_gelu_backward", mutates_args=())
def norm_gelu_backward(
    grad_out: Tensor, x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `norm_gelu`: (..., C), that of x; and (3, C), those of bias, weight and shift."""
    grad_out, x, C = grad_out.contiguous(), x.contiguous(), x.shape[-1]
    n_rows, (rows, width) = x.numel() // C, _rows_of_norm(C)
    programs, tiles = _tiles(n_rows, rows)
    grad, partial = torch.empty_like(x), x.new_empty((programs, 3, C), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _norm_gelu_backward_kernel[(programs,)](
            grad_out, x, bias, weight, shift, mean, scale, grad, partial, n_rows, tiles, C=C, ROWS=rows, CHANNELS=width
        )
    return grad, partial.sum(dim=0).to(weight.dtype)


@bias_gelu.register_fake
def _(x, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@bias_gelu_backward.register_fake
def _(grad, x, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


@add_norm.register_fake
def _(x, branch, bias, weight, shift, eps):  # type: ignore[no-untyped-def]
    of_rows = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), *of_rows


@add_norm_backward.register_fake
def _(grad_sum, grad_out, total, weight, mean, scale):  # type: ignore[no-untyped-def]
    return total.new_empty(total.shape), weight.new_empty((3, total.shape[-1]))


@norm_gelu.register_fake
def _(x, bias, weight, shift, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), *(x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))


@norm_gelu_backward.register_fake
def _(grad_out, x, bias, weight, shift, mean, scale):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty((3, x.shape[-1]))


def _keep_for_gelu(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _keep_for_norm(ctx, inputs, output):  # type: ignore[no-untyped-def]
    weight = inputs[3]
    total, _, mean, scale = output
    ctx.mark_non_differentiable(mean, scale)
    ctx.save_for_backward(total, weight, mean, scale)


def _backward_of_norm(ctx, grad_sum, grad_out, *_):  # type: ignore[no-untyped-def]
    grad, of_channels = add_norm_backward(grad_sum, grad_out, *ctx.saved_tensors)
    return grad, grad, *of_channels.unbind(), None


def _backward_of_gelu(ctx, grad):  # type: ignore[no-untyped-def]
    return bias_gelu_backward(grad, *ctx.saved_tensors)


bias_gelu.register_autograd(_backward_of_gelu, setup_context=_keep_for_gelu)
add_norm.register_autograd(_backward_of_norm, setup_context=_keep_for_norm)


def _keep_for_norm_gelu(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, _ = inputs
    _, mean, scale = output
    ctx.mark_non_differentiable(mean, scale)
    ctx.save_for_backward(*tensors, mean, scale)


def _backward_of_norm_gelu(ctx, grad, *_):  # type: ignore[no-untyped-def]
    grad, of_channels = norm_gelu_backward(grad, *ctx.saved_tensors)
    return grad, *of_channels.unbind(), None


norm_gelu.register_autograd(_backward_of_norm_gelu, setup_context=_keep_for_norm_gelu)
