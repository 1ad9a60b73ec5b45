"""The Triton kernels against the PyTorch path, run by Triton's interpreter where there is no GPU."""

import importlib
import importlib.util
import math
import os
import sys

import pytest
import torch

from nnunet_mim.config import PRESETS
from nnunet_mim.networks import depthwise
from nnunet_mim.networks.depthwise import DepthwiseConv3d
from nnunet_mim.networks.depthwise_cpu import depthwise_on_tokens

ON_CI = os.environ.get("CI") == "true" and sys.platform == "linux"  # a missing Triton is a failure there
MISSING = importlib.util.find_spec("triton") is None and not ON_CI
pytestmark = pytest.mark.skipif(MISSING, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {  # grid, token, channels, number of visible tokens of each view
    "cube, several chunks of lines": ((3, 3, 2), (4, 4, 4), 5, (7, 7)),
    "token of 2, where the kernel reaches its neighbours' far side": ((3, 2, 4), (2, 2, 2), 3, (11, 11)),
    "token of 1, where it reaches two tokens on": ((2, 3, 3), (2, 1, 1), 6, (8, 8)),
    "anisotropic": ((2, 3, 2), (1, 4, 2), 7, (5, 5)),
    "one visible token": ((2, 2, 2), (3, 3, 3), 2, (1, 1)),
    "one token, nothing masked: a whole patch": ((1, 1, 1), (6, 5, 7), 3, (1, 1)),
    "lines shorter than the token": ((1, 1, 3), (1, 2, 10), 4, (2, 1)),
    "a token whose length is a prime: lines of one voxel": ((1, 1, 2), (1, 1, 11), 4, (2, 1)),
    "all visible": ((2, 2, 2), (2, 3, 2), 4, (8, 8)),
    "several blocks of channels that divide them": ((2, 1, 2), (2, 2, 2), 48, (3, 3)),
    "several blocks of channels, the last one partly empty": ((1, 2, 2), (2, 1, 2), 70, (2, 2)),
    "views with other numbers of tokens, one without any": ((2, 2, 2), (2, 2, 4), 12, (3, 0, 8, 1)),
    "stage 1 of small": ((2, 1, 2), (8, 8, 8), 24, (2, 3)),
}


@pytest.fixture(scope="module")
def kernels():
    """The module; where there is no GPU, tests/conftest.py has its kernels interpreted.

    The interpreter takes as long for a large block as for a small one, so blocks are large there.
    """
    module = importlib.import_module("nnunet_mim.networks.depthwise_triton")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(module, "ROWS", 1024)
            patch.setattr(module, "CHANNELS", 512)
            patch.setattr(module, "LINES_PER_CHUNK", 128)
        yield module


def make(kernels, case, dtype=torch.float32, seed=0):
    """A convolution, voxels and gradients of tokens in any order, and (raster numbers, views, table, grid, token)."""
    grid, token, channels, n_visible = CASES[case]
    torch.manual_seed(seed)
    conv = DepthwiseConv3d(channels, 5).to(DEVICE, dtype if dtype == torch.float64 else torch.float32)
    ids = torch.cat([torch.randperm(math.prod(grid))[:n] for n in n_visible])
    view = torch.arange(len(n_visible)).repeat_interleave(torch.tensor(n_visible))
    order = torch.randperm(len(ids))
    ids, view = ids[order].to(DEVICE), view[order].to(DEVICE)
    x = torch.randn(len(ids), *token, channels).to(DEVICE, dtype)
    table = kernels.slot_table(ids, view, len(n_visible), list(grid), list(token), 5)
    return conv, x, torch.randn_like(x), (ids, view, table, list(grid), list(token))


def dense(x, conv, ids, view, grid):
    """The convolution of one view after the other, by the dense grid."""
    y = torch.zeros_like(x)
    for number in view.unique():
        mine = view == number
        y[mine] = depthwise_on_tokens(x[mine][None], conv.weight, conv.bias, ids[mine][None], tuple(grid))[0]
    return y


def run(function, x, conv, grad):
    conv.zero_grad()
    x = x.detach().requires_grad_()
    y = function(x)
    y.backward(grad.to(y.dtype))
    return y.detach(), x.grad, conv.weight.grad.clone(), conv.bias.grad.clone()


def run_both(kernels, conv, x, grad, tokens, exact=None):
    """Result and gradients of the kernels, and of the dense grid on voxels of type `exact`."""
    ids, view, _, grid, _ = tokens
    found = run(lambda x: kernels.masked_depthwise(x, conv.weight, conv.bias, *tokens), x, conv, grad)
    x, grad = x.to(exact), grad.to(exact)
    return found, run(lambda x: dense(x, conv, ids, view, grid), x, conv, grad)


@pytest.mark.parametrize("case", list(CASES))
def test_forward_and_gradients_equal_the_dense_grid(kernels, case, monkeypatch):
    if case.startswith("several blocks"):
        monkeypatch.setattr(kernels, "CHANNELS", 32)  # as on a GPU
    found, wanted = run_both(kernels, *make(kernels, case, torch.float64))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("number_type", [torch.int32, torch.int64])
def test_the_network_gets_the_same_convolution(kernels, number_type, monkeypatch):
    """`conv_on_tokens` of two groups of views, and a table of views numbered in either type."""
    conv, x, _, (ids, view, table, grid, token) = make(kernels, "anisotropic", torch.float64)
    order = view.argsort(stable=True)
    ids_keep = ids[order].view(2, -1)
    groups = [ids_keep[:1], ids_keep[1:]]
    monkeypatch.setattr(depthwise, "use_triton", lambda device: True)
    found = depthwise.conv_on_tokens(groups, tuple(grid))(conv, x[order])
    wanted = kernels.masked_depthwise(x, conv.weight, conv.bias, ids, view.to(number_type), table, grid, token)
    assert torch.equal(found, wanted[order])


@pytest.mark.parametrize("op", ["masked_depthwise", "masked_depthwise_backward"])
def test_what_torch_compile_is_told_about_the_operations_is_so(kernels, op):
    """Shapes, strides and kinds of the results, and that nothing is changed in place."""
    conv, x, grad, tokens = make(kernels, "anisotropic")
    weight, bias = conv.weight.detach(), conv.bias.detach()
    inputs = (x, weight, bias) if op == "masked_depthwise" else (grad, x, weight)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(kernels, op), (*inputs, *tokens), test_utils=checks)


def test_half_precision_voxels_are_summed_in_float32(kernels):
    found, wanted = run_both(kernels, *make(kernels, "anisotropic", torch.bfloat16), exact=torch.float32)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.01, atol=0.01)  # rounded once, at the end
    for a, b in zip(found[2:], wanted[2:], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("channels", sorted({c for network in PRESETS.values() for c in network.embed_dims[:3]}))
@pytest.mark.parametrize("token", [2, 4, 8])
def test_channels_of_all_presets(kernels, channels, token, monkeypatch):
    monkeypatch.setitem(CASES, "preset", ((2, 1, 2), (token,) * 3, channels, (1, 3)))
    found, wanted = run_both(kernels, *make(kernels, "preset", torch.float64))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-10)


def test_slot_table_by_hand(kernels):
    """Two views of a 1x2x2 grid: tokens 1, 2 visible, then 0, 3; the rim of a 5-kernel over tokens of 2 is one."""
    table = kernels.slot_table(torch.tensor([1, 2, 0, 3]), torch.tensor([0, 0, 1, 1]), 2, [1, 2, 2], [2, 2, 2], 5)
    assert table.shape == (2, 3, 4, 4)
    assert table[:, 1, 1:3, 1:3].tolist() == [[[-1, 0], [1, -1]], [[2, -1], [-1, 3]]]
    assert int((table >= 0).sum()) == 4


def test_operation_is_registered_properly(kernels):
    """PyTorch's own checks: shapes of the fake version, autograd registration, no aliasing."""
    conv, x, _, tokens = make(kernels, "one visible token")
    torch.library.opcheck(kernels.masked_depthwise, (x.requires_grad_(), conv.weight, conv.bias, *tokens))
