"""The Triton kernels against the PyTorch path, run by Triton's interpreter where there is no GPU."""

import importlib
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch

from nnunet_mim.networks.depthwise import DepthwiseConv3d
from nnunet_mim.networks.depthwise_cpu import depthwise_on_tokens

ON_CI = os.environ.get("CI") == "true" and sys.platform == "linux"  # a missing Triton is a failure there
MISSING = importlib.util.find_spec("triton") is None and not ON_CI
pytestmark = pytest.mark.skipif(MISSING, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "cube, several chunks of lines": ((3, 3, 2), (4, 4, 4), 5, 7),
    "token of 2, where the kernel reaches its neighbours' far side": ((3, 2, 4), (2, 2, 2), 3, 11),
    "token of 1, where it reaches two tokens on": ((2, 3, 3), (2, 1, 1), 6, 8),
    "anisotropic": ((2, 3, 2), (1, 4, 2), 7, 5),
    "one visible token": ((2, 2, 2), (3, 3, 3), 2, 1),
    "one token, nothing masked: a whole patch": ((1, 1, 1), (6, 5, 7), 3, 1),
    "all visible": ((2, 2, 2), (2, 3, 2), 4, 8),
    "several blocks of channels that divide them": ((2, 1, 2), (2, 2, 2), 48, 3),
    "several blocks of channels, the last one partly empty": ((1, 2, 2), (2, 1, 2), 70, 2),
}


@pytest.fixture(scope="module")
def kernels():
    """The module; where there is no GPU, tests/conftest.py has its kernels interpreted.

    The interpreter takes as long for a large block as for a small one, so blocks are large there.
    """
    module = importlib.import_module("nnunet_mim.networks.depthwise_triton")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(module, "LINES", 128)
            patch.setattr(module, "LINES_PER_CHUNK", 128)
        yield module


def make(case, dtype=torch.float32, n=2, seed=0):
    grid, token, channels, n_visible = CASES[case]
    torch.manual_seed(seed)
    conv = DepthwiseConv3d(channels, 5)
    order = torch.rand(n, math.prod(grid)).argsort(dim=1).to(DEVICE)
    ids_keep = order.split([n_visible, order.shape[1] - n_visible], dim=1)[0]  # rows not packed, as masks often are
    x = torch.randn(n, n_visible, *token, channels).to(dtype)
    grad = torch.randn_like(x)
    conv = conv.double() if dtype == torch.float64 else conv
    return conv.to(DEVICE), x.to(DEVICE), grad.to(DEVICE), ids_keep, grid, token


def run(function, x, conv, grad):
    conv.zero_grad()
    x = x.detach().requires_grad_()
    y = function(x)
    y.backward(grad.to(y.dtype))
    return y.detach(), x.grad, conv.weight.grad.clone(), conv.bias.grad.clone()


@pytest.mark.parametrize("case", list(CASES))
def test_forward_and_gradients_equal_the_dense_grid(kernels, case):
    conv, x, grad, ids_keep, grid, token = make(case, torch.float64)
    table = kernels.slot_table(ids_keep, list(grid), list(token), 5)
    wanted = run(lambda x: depthwise_on_tokens(x, conv.weight, conv.bias, ids_keep, grid), x, conv, grad)
    found = run(
        lambda x: kernels.masked_depthwise(x, conv.weight, conv.bias, ids_keep, table, list(grid), list(token)),
        x, conv, grad,
    )  # fmt: skip
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("op", ["masked_depthwise", "masked_depthwise_backward"])
def test_what_torch_compile_is_told_about_the_operations_is_so(kernels, op):
    """Shapes, strides and kinds of the results, and that nothing is changed in place."""
    conv, x, grad, ids_keep, grid, token = make("anisotropic")
    table = kernels.slot_table(ids_keep, list(grid), list(token), 5)
    weight, bias = conv.weight.detach(), conv.bias.detach()
    inputs = (x, weight, bias) if op == "masked_depthwise" else (grad, x, weight)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(kernels, op), (*inputs, ids_keep, table, list(grid), list(token)), test_utils=checks)


def test_half_precision_voxels_are_summed_in_float32(kernels):
    conv, x, grad, ids_keep, grid, token = make("anisotropic", torch.bfloat16)
    table = kernels.slot_table(ids_keep, list(grid), list(token), 5)
    found = run(
        lambda x: kernels.masked_depthwise(x, conv.weight, conv.bias, ids_keep, table, list(grid), list(token)),
        x, conv, grad,
    )  # fmt: skip
    wanted = run(
        lambda x: depthwise_on_tokens(x, conv.weight, conv.bias, ids_keep, grid), x.float(), conv, grad.float()
    )
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.01, atol=0.01)  # rounded once, at the end
    for a, b in zip(found[2:], wanted[2:], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_kernels_compile_for_a_hopper_gpu():
    """Down to machine code, for the three stages of `base`; Triton needs no GPU for that, but not the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["_convolve_kernel", "_weight_gradient_kernel"] * 3


COMPILE = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nnunet_mim.networks import depthwise_triton as kernels

POINTERS = {"x_ptr": "*bf16", "grad_ptr": "*bf16", "out_ptr": "*bf16", "weight_ptr": "*fp32", "bias_ptr": "*fp32",
            "partial_ptr": "*fp32", "ids": "*i64", "table": "*i32"}
for token, channels in ((8, 48), (4, 96), (2, 192)):
    constants = dict.fromkeys(("GX", "GY", "GZ"), 6) | dict.fromkeys(("TX", "TY", "TZ"), token)
    constants |= dict(HX=1, HY=1, HZ=1, KERNEL=5, LINE=token, LINES=kernels.LINES, SUM=tl.float32, HAS_BIAS=True,
                      CHANNELS=kernels._channel_block(channels), LINES_PER_CHUNK=kernels.LINES_PER_CHUNK)
    for kernel in (kernels._convolve_kernel, kernels._weight_gradient_kernel):
        names = kernel.arg_names
        kinds = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
        values = {(names.index(name),): value for name, value in constants.items() if name in names}
        code = compile(ASTSource(kernel, kinds, values), target=GPUTarget("cuda", 90, 32)).asm
        assert len(code["cubin"]) > 0
        assert "fma.rn.f32" in code["ptx"]
        print(kernel.__name__)
"""


def test_slot_table_by_hand(kernels):
    """Two views of a 1x2x2 grid: tokens 1, 2 visible, then 0, 3; the rim of a 5-kernel over tokens of 2 is one."""
    table = kernels.slot_table(torch.tensor([[1, 2], [0, 3]]), [1, 2, 2], [2, 2, 2], 5)
    assert table.shape == (2, 3, 4, 4)
    assert table[:, 1, 1:3, 1:3].tolist() == [[[-1, 0], [1, -1]], [[2, -1], [-1, 3]]]
    assert int((table >= 0).sum()) == 4


def test_operation_is_registered_properly(kernels):
    """PyTorch's own checks: shapes of the fake version, autograd registration, no aliasing."""
    conv, x, _, ids_keep, grid, token = make("one visible token")
    table = kernels.slot_table(ids_keep, list(grid), list(token), 5)
    arguments = (x.requires_grad_(), conv.weight, conv.bias, ids_keep, table, list(grid), list(token))
    torch.library.opcheck(kernels.masked_depthwise, arguments)
