"""Depthwise convolution: values and gradients against torch's own conv3d; its use on visible tokens against loops."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.networks.depthwise import DepthwiseConv3d, depthwise_on_tokens, grid_from_tokens, tokens_from_grid

sizes = st.tuples(*[st.integers(1, 7)] * 3)
small_grids = st.tuples(*[st.integers(1, 3)] * 3)
seeds = st.integers(0, 2**31 - 1)


def make(channels, kernel_size, dtype, seed):
    torch.manual_seed(seed)
    return DepthwiseConv3d(channels, kernel_size).to(dtype)


def plain(conv, x):
    """torch's own convolution on channels-last input."""
    y = F.conv3d(
        x.permute(0, 4, 1, 2, 3),
        conv.weight,
        conv.bias,
        padding=conv.weight.shape[-1] // 2,
        groups=conv.weight.shape[0],
    )
    return y.permute(0, 2, 3, 4, 1)


def close(a, b, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.detach().abs().max())))


@given(n=st.integers(1, 3), channels=st.integers(1, 5), size=sizes, kernel=st.sampled_from([3, 5]), seed=seeds)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_conv3d(dtype, n, channels, size, kernel, seed):
    conv = make(channels, kernel, dtype, seed)
    x = torch.randn(n, *size, channels, dtype=dtype, requires_grad=True)
    upstream = torch.randn(n, *size, channels, dtype=dtype)
    found = torch.autograd.grad(conv(x), (x, conv.weight, conv.bias), upstream)
    wanted = torch.autograd.grad(plain(conv, x), (x, conv.weight, conv.bias), upstream)
    close(conv(x), plain(conv, x), dtype)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        close(a, b, dtype)


def test_values_match_the_loop_over_kernel_offsets(reference):
    conv = make(3, 5, torch.float64, 0)
    x = torch.randn(2, 4, 6, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack(
            [reference.network.depthwise(one.permute(3, 0, 1, 2), conv.weight, conv.bias) for one in x]
        )
        close(conv(x), wanted.permute(0, 2, 3, 4, 1), torch.float64)


def test_gradcheck():
    conv = make(2, 5, torch.float64, 1)
    x = torch.randn(1, 3, 4, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, conv.weight, conv.bias))


@pytest.mark.parametrize("wanted", [s for n in (1, 2, 3) for s in itertools.combinations(("x", "weight", "bias"), n)])
def test_only_the_gradients_asked_for(wanted):
    """Frozen parameters and inputs without gradient, in every combination."""
    conv = make(2, 5, torch.float64, 2)
    x = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64, requires_grad="x" in wanted)
    conv.weight.requires_grad_("weight" in wanted)
    conv.bias.requires_grad_("bias" in wanted)
    tensors = {"x": x, "weight": conv.weight, "bias": conv.bias}
    asked = [tensors[name] for name in wanted]
    found = torch.autograd.grad(conv(x).square().sum(), asked)
    for a, b in zip(found, torch.autograd.grad(plain(conv, x).square().sum(), asked), strict=True):
        close(a, b, torch.float64)


def test_inputs_and_gradients_of_any_memory_layout():
    conv = make(3, 5, torch.float64, 3)
    base = torch.randn(2, 3, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    x = base.transpose(1, 4)[:, :, :, ::2]  # (2, 6, 8, 3, 3), strided in every axis
    weight = torch.randn(2, 3, 3, 8, 6, dtype=torch.float64).permute(0, 4, 3, 2, 1)
    (found,) = torch.autograd.grad((conv(x) * weight).sum(), base)
    (wanted,) = torch.autograd.grad((plain(conv, x) * weight).sum(), base)
    close(found, wanted, torch.float64)


def test_without_gradients_the_values_are_the_same():
    conv = make(4, 5, torch.float32, 4)
    x = torch.randn(2, 5, 6, 7, 4)
    with_gradient = conv(x)
    with torch.no_grad():
        close(conv(x), with_gradient, torch.float32)
    with torch.inference_mode():
        close(conv(x), with_gradient, torch.float32)


def test_autocast_takes_a_float32_input():
    conv = make(4, 5, torch.float32, 5)
    x = torch.randn(1, 5, 4, 6, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_parameters_are_laid_out_as_in_conv3d():
    shapes = {name: tuple(p.shape) for name, p in DepthwiseConv3d(6, 5).state_dict().items()}
    assert shapes == {"weight": (6, 1, 5, 5, 5), "bias": (6,)}


@given(n=st.integers(1, 2), grid=small_grids, token=small_grids, channels=st.integers(1, 3))
def test_tokens_are_in_c_order(n, grid, token, channels):
    size = [g * t for g, t in zip(grid, token, strict=True)]
    image = torch.arange(n * size[0] * size[1] * size[2] * channels).reshape(n, *size, channels)
    tokens = tokens_from_grid(image, token)
    for number, (i, j, k) in enumerate(itertools.product(*(range(g) for g in grid))):
        x, y, z = (slice(at * t, (at + 1) * t) for at, t in zip((i, j, k), token, strict=True))
        assert torch.equal(tokens[:, number], image[:, x, y, z])
    assert torch.equal(grid_from_tokens(tokens, grid), image)


@given(data=st.data(), grid=small_grids, token=small_grids, channels=st.integers(1, 3), seed=seeds)
def test_on_tokens_masked_voxels_count_as_zero(data, grid, token, channels, seed):
    conv = make(channels, 5, torch.float64, seed)
    n_tokens = grid[0] * grid[1] * grid[2]
    n_visible = data.draw(st.integers(1, n_tokens))
    ids_keep = torch.stack([torch.randperm(n_tokens)[:n_visible] for _ in range(2)])  # any order
    x = torch.randn(2, n_visible, *token, channels, dtype=torch.float64, requires_grad=True)

    image = torch.zeros(2, *(g * t for g, t in zip(grid, token, strict=True)), channels, dtype=torch.float64)
    boxes = {}
    for number, at in enumerate(itertools.product(*(range(g) for g in grid))):
        boxes[number] = tuple(slice(a * t, (a + 1) * t) for a, t in zip(at, token, strict=True))
    for row in range(2):
        for column, number in enumerate(ids_keep[row].tolist()):
            image[(row, *boxes[number])] = x[row, column]
    dense = plain(conv, image)
    wanted = torch.stack(
        [torch.stack([dense[(row, *boxes[number])] for number in ids_keep[row].tolist()]) for row in range(2)]
    )

    found = depthwise_on_tokens(conv, x, ids_keep, grid)
    close(found, wanted, torch.float64)
    upstream = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(found, (x, conv.weight, conv.bias), upstream),
        torch.autograd.grad(wanted, (x, conv.weight, conv.bias), upstream),
        strict=True,
    ):
        close(a, b, torch.float64)
