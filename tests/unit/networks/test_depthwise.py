"""Depthwise convolution: values against the loop over kernel offsets; its use on visible tokens against slices."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.networks import depthwise
from nnunet_mim.networks.depthwise import DepthwiseConv3d, conv_on_patches
from nnunet_mim.networks.depthwise_cpu import depthwise_on_tokens

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


def test_values_match_the_loop_over_kernel_offsets(reference):
    conv = make(3, 5, torch.float64, 0)
    x = torch.randn(2, 4, 6, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack(
            [reference.network.depthwise(one.permute(3, 0, 1, 2), conv.weight, conv.bias) for one in x]
        )
        found = conv_on_patches(2, x.device)(conv, x)
        close(found, wanted.permute(0, 2, 3, 4, 1), torch.float64)


def test_without_gradients_the_values_are_the_same():
    conv = make(4, 5, torch.float32, 4)
    x = torch.randn(2, 5, 6, 7, 4)
    convolve = conv_on_patches(2, x.device)
    with_gradient = convolve(conv, x)
    with torch.no_grad():
        close(convolve(conv, x), with_gradient, torch.float32)
    with torch.inference_mode():
        close(convolve(conv, x), with_gradient, torch.float32)


def test_autocast_takes_a_float32_input():
    conv = make(4, 5, torch.float32, 5)
    x = torch.randn(1, 5, 4, 6, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_on_patches(1, x.device)(conv, x)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_parameters_are_laid_out_as_in_conv3d():
    shapes = {name: tuple(p.shape) for name, p in DepthwiseConv3d(6, 5).state_dict().items()}
    assert shapes == {"weight": (6, 1, 5, 5, 5), "bias": (6,)}


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

    found = depthwise_on_tokens(x, conv.weight, conv.bias, ids_keep, grid)
    close(found, wanted, torch.float64)
    upstream = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(found, (x, conv.weight, conv.bias), upstream),
        torch.autograd.grad(wanted, (x, conv.weight, conv.bias), upstream),
        strict=True,
    ):
        close(a, b, torch.float64)


@pytest.mark.parametrize(("version", "new_enough"), [("3.2.0", False), ("3.3.1+git12", True), ("10.0", True)])
def test_a_triton_that_is_too_old_is_not_used_but_named(monkeypatch, version, new_enough):
    monkeypatch.setattr(depthwise.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(depthwise.importlib.metadata, "version", lambda name: version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert depthwise._has_triton() == new_enough
    named = [str(warning.message).split(" is ")[0] for warning in caught]
    assert named == ([] if new_enough else [f"Triton {version}"])
