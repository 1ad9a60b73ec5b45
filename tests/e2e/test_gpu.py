"""What only a GPU can show: bf16 pretraining, the masked encoder on CUDA, finetuning and prediction."""

import pytest
import torch

from nnunet_mim.config import PRESETS, PretrainConfig
from nnunet_mim.demo.cli import main as demo
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.depthwise import DepthwiseConv3d, conv_on_tokens, depthwise_on_tokens
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.pretraining.masking import random_masks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_encoder_on_cuda_equals_the_cpu_in_float64():
    network = PRESETS["tiny"]
    encoder = HybridEncoder(1, network.embed_dims, network.depths, network.strides, network.num_heads).double()
    x = torch.randn(2, 1, 64, 64, 64, dtype=torch.float64)
    ids_keep = torch.rand(2, 64).argsort(dim=1)[:, :26]
    expected = encoder(x, ids_keep)
    expected.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters()}
    encoder.zero_grad()
    encoder.cuda()
    latent = encoder(x.cuda(), ids_keep.cuda())
    latent.square().mean().backward()
    torch.testing.assert_close(latent.cpu(), expected, rtol=1e-9, atol=1e-10)
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), gradients[name], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("token", "channels"), [(8, 48), (4, 96), (2, 192)])
def test_triton_on_masks_of_a_real_step(token, channels):
    """Masks drawn on the device, sizes of `base` (several chunks, several blocks of channels), a view of 96 voxels."""
    level = levels_of(PretrainConfig())[2]
    generator = torch.Generator("cuda").manual_seed(0)
    ids_keep = random_masks(8, level, torch.device("cuda"), generator)[0]
    conv = DepthwiseConv3d(channels).cuda()
    x = torch.randn(*ids_keep.shape, *[token] * 3, channels, device="cuda", requires_grad=True)
    upstream = torch.randn_like(x)
    inputs = x, conv.weight, conv.bias
    y = conv_on_tokens(ids_keep, level.grid)(conv, x)
    found = [y, *torch.autograd.grad(y, inputs, upstream)]
    y = depthwise_on_tokens(conv, x, ids_keep, level.grid)
    for a, b in zip(found, [y, *torch.autograd.grad(y, inputs, upstream)], strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-4


def test_the_whole_way_on_the_gpu(tmp_path):
    """Pretraining in bf16, finetuning and prediction, through mim_demo."""
    assert demo(["-o", str(tmp_path / "demo"), "-device", "cuda", "--quick"]) == 0
    assert (tmp_path / "demo" / "index.html").is_file()
