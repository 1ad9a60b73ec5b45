"""The CPU's own depthwise convolution in float32, against PyTorch's convolution of the dense grid in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.networks import depthwise, depthwise_cpu
from nnunet_mim.networks.depthwise import DepthwiseConv3d, conv_on_patches, conv_on_tokens
from nnunet_mim.networks.token_layout import grid_from_tokens, tokens_from_grid

small_grids = st.tuples(*[st.integers(1, 3)] * 3)
tokens = st.tuples(*[st.integers(1, 4)] * 3)
seeds = st.integers(0, 2**31 - 1)


def make(grid, token, channels, n_visible, kernel=5, n=2, seed=0):
    torch.manual_seed(seed)
    conv = DepthwiseConv3d(channels, kernel)
    ids_keep = torch.rand(n, math.prod(grid)).argsort(dim=1)[:, :n_visible]  # any order
    x = torch.randn(n, n_visible, *token, channels)
    return conv, x, torch.randn_like(x), ids_keep


def reference(conv, x, upstream, ids_keep, grid):
    """Values and gradients of the dense masked computation with PyTorch's conv3d, in float64."""
    weight, bias = (p.detach().double().requires_grad_() for p in (conv.weight, conv.bias))
    x = x.detach().double().requires_grad_()
    rows = torch.arange(x.shape[0])[:, None]
    all_tokens = x.new_zeros(x.shape[0], math.prod(grid), *x.shape[2:]).index_put((rows, ids_keep), x)
    image = grid_from_tokens(all_tokens, grid).permute(0, 4, 1, 2, 3)
    y = F.conv3d(image, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    y = tokens_from_grid(y.permute(0, 2, 3, 4, 1), x.shape[2:5])[rows, ids_keep]
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), upstream.double())]


def on_tokens(ids_keep, grid):
    """`conv_on_tokens` of one group of views: (N, K, X, Y, Z, C) → the same."""
    convolve = conv_on_tokens([ids_keep], grid)
    return lambda conv, x: convolve(conv, x.flatten(0, 1)).unflatten(0, x.shape[:2])


def ours(convolve, conv, x, upstream):
    x = x.detach().requires_grad_()
    y = convolve(conv, x)
    function = y.grad_fn
    while type(function).__name__.startswith(("View", "UnsafeView", "Squeeze", "Unsqueeze")):
        function = function.next_functions[0][0]
    assert "MaskedDepthwise" in type(function).__name__  # not the fallback
    return [y.detach(), *torch.autograd.grad(y, (x, conv.weight, conv.bias), upstream)]


def assert_close(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


@given(
    data=st.data(), grid=small_grids, token=tokens, channels=st.integers(1, 5), kernel=st.sampled_from([3, 5]),
    seed=seeds,
)  # fmt: skip
def test_on_tokens(data, grid, token, channels, kernel, seed):
    n_visible = data.draw(st.integers(1, math.prod(grid)))
    conv, x, upstream, ids_keep = make(grid, token, channels, n_visible, kernel, seed=seed)
    found = ours(on_tokens(ids_keep, grid), conv, x, upstream)
    assert_close(found, reference(conv, x, upstream, ids_keep, grid))


@given(data=st.data(), grid=small_grids, token=tokens, channels=st.integers(1, 3), seed=seeds)
def test_in_float64_nothing_but_rounding_differs(data, grid, token, channels, seed):
    """The same function on float64, where it is not used because PyTorch's float64 convolution is slow."""
    n_visible = data.draw(st.integers(1, math.prod(grid)))
    conv, x, upstream, ids_keep = make(grid, token, channels, n_visible, seed=seed)
    wanted = reference(conv, x, upstream, ids_keep, grid)
    found = ours(
        lambda conv, x: depthwise_cpu.MaskedDepthwise.apply(x, conv.weight, conv.bias, ids_keep, grid),
        conv.double(), x.double(), upstream.double(),
    )  # fmt: skip
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("token", [(16, 8, 12), (9, 10, 11), (1, 13, 2)])
def test_on_patches_larger_than_a_box(token):
    """Sizes that 8 divides, that only a smaller box divides, and a prime."""
    conv, x, upstream, ids_keep = make((1, 1, 1), token, 3, 1)
    convolve = conv_on_patches(2, x.device)
    found = ours(lambda conv, x: convolve(conv, x.squeeze(1)).unsqueeze(1), conv, x, upstream)
    assert_close(found, reference(conv, x, upstream, ids_keep, (1, 1, 1)))


def test_groups_of_views_with_other_numbers_of_visible_tokens():
    grid, token = (2, 3, 2), (4, 2, 4)
    cases = [make(grid, token, 3, n_visible, n=n) for n, n_visible in ((2, 7), (1, 12), (3, 1))]
    conv, ids = cases[0][0], [case[3] for case in cases]
    convolve = conv_on_tokens(ids, grid)
    x, upstream = (torch.cat([case[part].flatten(0, 1) for case in cases]) for part in (1, 2))
    x.requires_grad_()
    y = convolve(conv, x)
    found = y.detach(), *torch.autograd.grad(y, (x, conv.weight, conv.bias), upstream)
    wanted = [reference(conv, case[1], case[2], case[3], grid) for case in cases]
    joined = [torch.cat([values[part].flatten(0, 1) for values in wanted]) for part in (0, 1)]
    assert_close(found, [*joined, *(sum(values[part] for values in wanted) for part in (2, 3))])


@pytest.mark.parametrize("n_bytes", [1, 20_000, 10**9])
def test_boxes_in_one_call_or_in_many(monkeypatch, n_bytes):
    monkeypatch.setattr(depthwise_cpu, "BYTES_PER_CALL", n_bytes)
    conv, x, upstream, ids_keep = make((2, 3, 2), (4, 2, 4), 6, 7)
    found = ours(on_tokens(ids_keep, (2, 3, 2)), conv, x, upstream)
    assert_close(found, reference(conv, x, upstream, ids_keep, (2, 3, 2)))


@pytest.mark.parametrize("asked", [s for n in (1, 2, 3) for s in itertools.combinations(("x", "weight", "bias"), n)])
def test_only_the_gradients_asked_for(asked):
    """Frozen parameters and inputs without gradient, in every combination."""
    conv, x, upstream, ids_keep = make((2, 2, 1), (2, 4, 3), 2, 3)
    x.requires_grad_("x" in asked)
    conv.weight.requires_grad_("weight" in asked)
    conv.bias.requires_grad_("bias" in asked)
    names = dict(zip(("x", "weight", "bias"), reference(conv, x, upstream, ids_keep, (2, 2, 1))[1:], strict=True))
    tensors = {"x": x, "weight": conv.weight, "bias": conv.bias}
    y = on_tokens(ids_keep, (2, 2, 1))(conv, x)
    found = torch.autograd.grad(y, [tensors[name] for name in asked], upstream)
    assert_close(found, [names[name] for name in asked])


def test_any_memory_layout():
    conv, x, upstream, ids_keep = make((2, 2, 2), (3, 2, 4), 4, 5)
    wanted = reference(conv, x, upstream, ids_keep, (2, 2, 2))
    strided = x.permute(5, 2, 0, 4, 1, 3).contiguous().permute(2, 4, 1, 5, 3, 0)
    gradient = upstream.transpose(0, 5).contiguous().transpose(0, 5)
    assert not strided.is_contiguous()
    assert not gradient.is_contiguous()
    assert_close(ours(on_tokens(ids_keep, (2, 2, 2)), conv, strided, gradient), wanted)


def test_where_it_is_used():
    x = torch.zeros(1, 1, 2, 2, 2, 1)
    assert depthwise.use_cpu_path(x)
    assert not depthwise.use_cpu_path(x.double())
    assert not depthwise.use_cpu_path(x.to("meta"))
    with torch.no_grad():
        assert not depthwise.use_cpu_path(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not depthwise.use_cpu_path(x)
