"""What only a GPU can show: bf16 pretraining, the masked encoder on CUDA, finetuning and prediction."""

import pytest
import torch

from nnunet_mim.config import PRESETS
from nnunet_mim.demo.cli import main as demo
from nnunet_mim.networks.hybrid_encoder import HybridEncoder

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


def test_the_whole_way_on_the_gpu(tmp_path):
    """Pretraining in bf16, finetuning and prediction, through mim_demo."""
    assert demo(["-o", str(tmp_path / "demo"), "-device", "cuda", "--quick"]) == 0
    assert (tmp_path / "demo" / "index.html").is_file()
