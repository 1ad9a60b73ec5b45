"""What only a GPU can show: bf16 pretraining, the masked encoder on CUDA, finetuning and prediction."""

import pytest
import torch
from lightning_fabric import Fabric

from nnunet_mim.config import PRESETS, PretrainConfig
from nnunet_mim.demo.cli import main as demo
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.build import build_network
from nnunet_mim.networks.depthwise import DepthwiseConv3d, conv_on_tokens
from nnunet_mim.networks.depthwise_cpu import depthwise_on_tokens
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.pretraining.distributed.ranks import ALONE
from nnunet_mim.pretraining.objective.masks import random_masks
from nnunet_mim.pretraining.objective.views import nested_views
from nnunet_mim.pretraining.state import build_optimizer
from nnunet_mim.pretraining.step import RecordedStep, ordinary_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_encoder_on_cuda_equals_the_cpu_in_float64():
    network = PRESETS["tiny"]
    encoder = HybridEncoder(1, network).double()
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
    y = conv_on_tokens([ids_keep], level.grid)(conv, x.flatten(0, 1)).unflatten(0, ids_keep.shape)
    found = [y, *torch.autograd.grad(y, (x, conv.weight, conv.bias), upstream)]
    conv, x, upstream = conv.double(), x.detach().double().requires_grad_(), upstream.double()  # no TF32 there
    inputs = x, conv.weight, conv.bias
    y = depthwise_on_tokens(x, conv.weight, conv.bias, ids_keep, level.grid)
    for a, b in zip(found, [y, *torch.autograd.grad(y, inputs, upstream)], strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-4


@pytest.mark.parametrize(("views_per_pass", "decoder"), [(32, "mim"), (3, "mim"), (None, "unet")])
def test_recorded_steps_have_the_figures_of_ordinary_ones(views_per_pass, decoder):
    """Eight steps in float32 with a rising rate and new views every time; the last pass may have fewer views."""
    config = PretrainConfig(preset="tiny", view_size=(64, 64, 64), n_children=(2, 2), decoder=decoder)
    levels, fabric = levels_of(config), Fabric(accelerator="cuda", devices=1, precision="32-true")
    found = {}
    for recorded in (True, False):
        torch.manual_seed(0)
        network = build_network(config)
        fabric.to_device(network)
        optimizer = build_optimizer(network, config)
        flat, fill = torch.full((1,), 0.04, device="cuda"), torch.zeros(1, device="cuda")
        crops = torch.randn(2, 1, *levels[0].fov, device="cuda")
        valid = torch.tensor([[[0, n] for n in levels[0].fov]] * 2, device="cuda")
        step = ordinary_step(network, network, optimizer, flat, config, ALONE, views_per_pass)
        step = RecordedStep(step, optimizer) if recorded else step
        rows = []
        for i in range(8):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (i + 1) / 8
            generator = torch.Generator("cuda").manual_seed(i)
            figures = step(nested_views(crops, valid, fill, levels, generator, flat))
            rows.append(torch.stack(list(figures.row().values())))
        found[recorded] = torch.stack(rows).cpu()
    torch.testing.assert_close(found[True], found[False], rtol=1e-3, atol=1e-4)


def test_the_whole_way_on_the_gpu(tmp_path):
    """Pretraining in bf16, finetuning and prediction, through mim_demo."""
    assert demo(["-o", str(tmp_path / "demo"), "-device", "cuda", "--quick"]) == 0
    assert (tmp_path / "demo" / "index.html").is_file()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_finetuning_on_two_gpus(workplace_of):
    """Pretrained weights reach both ranks before DDP wraps the network."""
    work = workplace_of("two_gpus")
    work.write_dataset("Dataset909_TwoGPUs", 5, 32)
    work.plan(909)
    recipe = ("num_epochs=2", "iterations_per_epoch=2", "val_iterations_per_epoch=1")
    work("mim_plan", "-d", "909", "--preset", "tiny", "--set", "patch_size=32,32,32", "batch_size=2", *recipe)
    plans = ("-p", "nnUNetMiMPlans", "-c", "3d_fullres")
    work("nnUNetv2_preprocess", "-d", "909", "-plans_name", *plans[1:], "-np", "1")
    work("mim_pretrain", "-d", "909", *plans, "--preset", "tiny", "--view", "32", "--iterations", "2", "-f", "0")
    work("nnUNetv2_train", "909", "3d_fullres", "0", "-tr", "nnUNetTrainerMiM", *plans[:2], "-num_gpus", "2")
    run = work.folder / "nnUNet_results/Dataset909_TwoGPUs/nnUNetTrainerMiM__nnUNetMiMPlans__3d_fullres/fold_0"
    assert (run / "validation" / "summary.json").is_file()
    assert (run / "mim_transfer.json").is_file()
