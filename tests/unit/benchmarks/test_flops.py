"""FLOPs against a hand-computed case, and against what the modules really multiply."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from nnunet_mim.config import PRESETS, NetworkConfig, PretrainConfig
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.conv_blocks import PatchConv, PointwiseConv
from nnunet_mim.networks.depthwise import DepthwiseConv3d
from nnunet_mim.networks.mask_in_mask import MaskedViews, MaskInMask
from nnunet_mim.networks.vit_blocks import ViTBlock

FILE = Path(__file__).parents[3] / "benchmarks" / "flops.py"
ANISOTROPIC = NetworkConfig((3, 4, 5, 6), (1, 2, 1, 2), 2, 2.0, ((1, 2, 2), (2, 1, 2), (1, 2, 1), (2, 2, 1)), 12, 2, 3)


@pytest.fixture(scope="module")
def flops():
    """The module, which is not part of the package."""
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counted_flops(model, images, ids_keep, ids_masked):
    """Multiply-adds of every layer times 2, from the shapes it was really called with."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, (PointwiseConv, PatchConv, nn.Linear)):
            total += 2 * output.numel() * module.weight[0].numel()
        elif isinstance(module, ViTBlock):
            stream = inputs[0].x
            ((n, length),) = inputs[1] if len(inputs) > 1 else [stream.shape[:2]]
            dim = stream.shape[-1]
            total += 2 * 2 * n * length * length * dim

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    model([MaskedViews(images, ids_keep, ids_masked)])
    for hook in hooks:
        hook.remove()
    for stage in model.encoder.stages:  # runs on a dense grid; what is needed is counted here
        voxels = math.prod(model.encoder.token_size)
        for s in model.encoder.stages:
            voxels //= math.prod(s.embed.proj.stride)
            if s is stage:
                break
        convolutions = [m for m in stage.modules() if isinstance(m, DepthwiseConv3d)]
        total += sum(2 * c.weight.numel() * voxels * ids_keep.numel() for c in convolutions)
    return total


@pytest.mark.parametrize("network", [ANISOTROPIC, PRESETS["tiny"]], ids=["anisotropic", "tiny"])
@pytest.mark.parametrize("in_channels", [1, 2])
def test_formula_equals_the_layers(flops, network, in_channels):
    model = MaskInMask(network, in_channels, alignment="none")
    size = [2 * p for p in network.token_size]
    order = torch.rand(3, 8).argsort(dim=1)
    counted = counted_flops(model, torch.randn(3, in_channels, *size), order[:, :3], order[:, 3:])
    assert counted == 3 * flops.view_flops(network, in_channels, 3, 8)


def test_hand_computed(flops):
    """One block of width 2, MLP of width 4, 3 tokens: qkv+proj 2*3*2*8, MLP 2*3*2*8, attention 2*2*3*3*2."""
    assert flops.transformer_flops(3, 2, 1, 2.0) == 96 + 96 + 72


def test_published_base(flops):
    """Base, 96³, 86 of 216 tokens visible, in GFLOP: 28 in the dense encoder without stage 1's convolution to tokens
    (2·48·8³·384 a token), 15 to 16 in the decoder.
    """
    network = PRESETS["base"]
    to_token = 216 * 2 * 48 * 8**3 * 384
    assert (flops.encoder_flops(network, 1, 86, 216) - to_token) / 1e9 == pytest.approx(28, abs=0.1)
    assert flops.decoder_flops(network, 1, 86, 216, 216) / 1e9 == pytest.approx(15.7, abs=0.1)
    ratio = flops.dense_view_flops(network, 1, 86, 216) / flops.view_flops(network, 1, 86, 216)
    assert ratio == pytest.approx(1.58, abs=0.01)


def test_crop_adds_up_its_views(flops):
    config = PretrainConfig(preset="tiny", view_size=(32, 32, 32), n_children=(3, 2))
    levels = levels_of(config)
    one = [flops.view_flops(config.network, 1, level.n_visible_tokens, level.n_tokens) for level in levels]
    assert flops.crop_flops(config.network, 1, levels) == 3 * (one[0] + 3 * one[1] + 6 * one[2])
