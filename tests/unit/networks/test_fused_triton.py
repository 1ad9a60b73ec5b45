"""Fused kernels against PyTorch's own operations, in Triton's interpreter where there is no GPU."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from nnunet_mim.config import NetworkConfig
from nnunet_mim.networks import conv_blocks, residual
from nnunet_mim.networks.mask_in_mask import MaskedViews, MaskInMask

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(3, 5, 24), (130, 48), (1, 1), (70, 200), (9, 4, 384)]


@pytest.fixture(scope="module")
def kernels():
    """The module; where there is no GPU, tests/conftest.py has its kernels interpreted."""
    return importlib.import_module("nnunet_mim.networks.fused_triton")


def inputs(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]


def close(found, wanted, tolerance):
    for a, b in zip([x.detach() for x in found], [x.detach() for x in wanted], strict=True):
        assert a.shape == b.shape
        assert float((a.float() - b.float()).norm()) <= tolerance * max(1e-6, float(b.float().norm()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_and_gelu(kernels, shape, dtype, tolerance):
    x, bias = inputs(shape, shape[-1:], dtype=dtype)
    upstream = torch.randn(shape, device=DEVICE).to(dtype)
    y = kernels.bias_gelu(x, bias)
    found = [y, *torch.autograd.grad(y, (x, bias), upstream)]
    assert all(tensor.dtype == dtype for tensor in found)
    exact = [value.detach().double().requires_grad_() for value in (x, bias)]
    y = F.gelu(exact[0] + exact[1])
    close(found, [y, *torch.autograd.grad(y, exact, upstream.double())], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:])
def test_addition_and_layer_norm(kernels, shape, dtype, tolerance):
    channels = shape[-1:]
    values = inputs(shape, shape, channels, channels, channels, dtype=dtype)
    upstream = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)]
    total, out, mean, scale = kernels.add_norm(*values, 1e-5)
    found = [total, out, *torch.autograd.grad((total, out), values, upstream)]
    assert all(tensor.dtype == dtype for tensor in found)
    assert mean.dtype == scale.dtype == torch.float32
    x, branch, bias, weight, shift = exact = [value.detach().double().requires_grad_() for value in values]
    total = x + branch + bias
    out = F.layer_norm(total, channels, weight, shift, 1e-5)
    close(found, [total, out, *torch.autograd.grad((total, out), exact, [g.double() for g in upstream])], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:])
def test_bias_layer_norm_and_gelu(kernels, shape, dtype, tolerance):
    channels = shape[-1:]
    values = inputs(shape, channels, channels, channels, dtype=dtype)
    upstream = torch.randn(shape, device=DEVICE).to(dtype)
    y, *_ = kernels.norm_gelu(*values, 1e-5)
    found = [y, *torch.autograd.grad(y, values, upstream)]
    assert all(tensor.dtype == dtype for tensor in found)
    x, bias, weight, shift = exact = [value.detach().double().requires_grad_() for value in values]
    y = F.gelu(F.layer_norm(x + bias, channels, weight, shift, 1e-5))
    close(found, [y, *torch.autograd.grad(y, exact, upstream.double())], tolerance)


def test_sums_over_many_tiles_of_a_program(kernels, monkeypatch):
    """As where there are more rows than PROGRAMS tiles."""
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    x, bias = inputs((300, 24), (24,))
    y = kernels.bias_gelu(x, bias)
    (found,) = torch.autograd.grad(y.sum(), bias)
    (wanted,) = torch.autograd.grad(F.gelu(x + bias).sum(), bias)
    close([found], [wanted], 1e-5)
    values = inputs((700, 24), (700, 24), (24,), (24,), (24,))
    total, out, *_ = kernels.add_norm(*values, 1e-5)
    found = torch.autograd.grad(total.sum() + out.square().sum(), values)
    total = values[0] + values[1] + values[2]
    out = F.layer_norm(total, (24,), values[3], values[4], 1e-5)
    close(found, torch.autograd.grad(total.sum() + out.square().sum(), values), 1e-4)


def test_a_result_that_is_not_used_gets_no_gradient(kernels):
    values = inputs((40, 24), (40, 24), (24,), (24,), (24,))
    total, out, *_ = kernels.add_norm(*values, 1e-5)
    (found,) = torch.autograd.grad(total.sum(), values[0], retain_graph=True)
    assert torch.equal(found, torch.ones_like(found))
    (found,) = torch.autograd.grad(out.square().sum(), values[0])
    (wanted,) = torch.autograd.grad(
        F.layer_norm(values[0] + values[1] + values[2], (24,), values[3], values[4], 1e-5).square().sum(), values[0]
    )
    close([found], [wanted], 1e-4)


OPERATIONS = [f"{name}{end}" for name in ("bias_gelu", "add_norm", "norm_gelu") for end in ("", "_backward")]


@pytest.mark.parametrize("op", OPERATIONS)
def test_what_torch_compile_is_told_about_the_operations_is_so(kernels, op):
    x, y, bias, weight, shift = (value.detach() for value in inputs((6, 24), (6, 24), (24,), (24,), (24,)))
    of_rows = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
    arguments = {
        "bias_gelu": (x, bias),
        "bias_gelu_backward": (y, x, bias),
        "add_norm": (x, y, bias, weight, shift, 1e-5),
        "add_norm_backward": (x, y, x, weight, *of_rows),
        "norm_gelu": (x, bias, weight, shift, 1e-5),
        "norm_gelu_backward": (y, x, bias, weight, shift, *of_rows),
    }
    torch.library.opcheck(getattr(kernels, op), arguments[op], test_utils=("test_schema", "test_faketensor"))


def test_a_network_of_fused_kernels_computes_what_the_plain_one_does(monkeypatch):
    """No bias, addition or norm is left out or done twice where kernels take several of them at once."""
    config = NetworkConfig((8, 8, 16, 24), (1, 2, 1, 2), 2, decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=2)
    torch.manual_seed(0)
    model = MaskInMask(config).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and shifts are 0 at first, and weights of norms 1
            parameter += 0.1 * torch.randn_like(parameter)
    images = torch.randn(2, 1, 32, 32, 32, device=DEVICE)
    order = torch.rand(2, 8, device=DEVICE).argsort(dim=1)
    views = MaskedViews(images, order[:, :3].sort(dim=1).values, order[:, 3:].sort(dim=1).values)

    def computed():
        model.zero_grad()
        (output,) = model([views])
        (output.prediction.square().mean() + output.features.square().mean()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"prediction": output.prediction.detach(), "features": output.features.detach(), **gradients}

    plain, calls = computed(), []
    for module in (residual, conv_blocks):
        monkeypatch.setattr(module, "fuses", lambda x: calls.append(1) or True)
    fused = computed()
    assert len(calls) > 10
    assert fused.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()), msg=name)
