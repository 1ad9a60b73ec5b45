"""A bfloat16 copy computes the step; the float32 weights learn."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.build import build_network
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.pretraining.distributed.ranks import ALONE
from nnunet_mim.pretraining.half_precision import HalfPrecisionCopy
from nnunet_mim.pretraining.objective.levels import level_losses, unet_losses
from nnunet_mim.pretraining.objective.views import nested_views
from nnunet_mim.pretraining.state import build_optimizer
from nnunet_mim.pretraining.step import ordinary_step

NETWORK = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), 2, decoder_embed_dim=12, decoder_depth=2, decoder_num_heads=2)
CONFIG = PretrainConfig(network=NETWORK, view_size=(32, 32, 32), n_children=(2, 2))
FLAT = torch.tensor([0.05])


@pytest.fixture(autouse=True)
def plain_operations():
    """PyTorch's own bfloat16 operations: in a run of all tests its CPU libraries gave an infinite gradient once."""
    with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def network():
    torch.manual_seed(0)
    return MaskInMask(NETWORK)


@pytest.fixture
def views():
    levels = levels_of(CONFIG)
    torch.manual_seed(1)
    crops, valid = torch.randn(2, 1, *levels[0].fov), torch.tensor([[[0, n] for n in levels[0].fov]] * 2)
    return nested_views(crops, valid, torch.zeros(1), levels, torch.Generator().manual_seed(0), FLAT)


def loss_and_gradients(network, forward, views, views_per_pass=None):
    network.zero_grad()
    total = 0.0
    for loss, _ in level_losses(forward, views, FLAT, CONFIG, views_per_pass):
        loss.backward()
        if forward is not network:
            forward.give_gradients()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in network.named_parameters()}


def test_every_activation_is_half_precision_and_every_loss_is_not(network, views):
    copy = HalfPrecisionCopy(network)
    seen = set()
    for module in copy.network.modules():
        module.register_forward_hook(lambda _, __, out: seen.update([out.dtype] if torch.is_tensor(out) else []))
    for loss, parts in level_losses(copy, views, FLAT, CONFIG):
        assert loss.dtype == torch.float32
        assert all(part.prediction.dtype == torch.bfloat16 for part in parts)
    assert seen == {torch.bfloat16}


def test_the_unet_computes_in_half_precision_and_learns_in_float32(views):
    torch.manual_seed(0)
    network = build_network(replace(CONFIG, decoder="unet"))
    ((wanted, _),) = unet_losses(network, views, FLAT, CONFIG)
    copy = HalfPrecisionCopy(network)
    ((loss, _),) = unet_losses(copy, views, FLAT, CONFIG)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=2e-2, atol=0)
    assert copy.reconstruct_with_unet([views[1].masked(slice(0, 1))])[0].dtype == torch.bfloat16
    loss.backward()
    copy.give_gradients()
    assert all(p.grad.dtype == torch.float32 for p in network.unet.parameters())


@pytest.mark.parametrize("views_per_pass", [None, 3])
def test_loss_and_gradients_are_those_of_float32_but_for_rounding(network, views, views_per_pass):
    loss, gradients = loss_and_gradients(network, network, views)
    found_loss, found = loss_and_gradients(network, HalfPrecisionCopy(network), views, views_per_pass)
    assert found_loss == pytest.approx(loss, rel=5e-3)
    assert {g.dtype for g in found.values()} == {torch.float32}
    wanted, got = (torch.cat([g.flatten() for g in each.values()]) for each in (gradients, found))
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    assert not torch.equal(got, wanted)  # the test itself: half precision has been used


def test_gradients_of_passes_add_up_in_float32(network):
    """A thousand passes of 1/1000 each: a sum in bfloat16 would stop growing at 256 of them."""
    copy = HalfPrecisionCopy(network)
    for _ in range(1000):
        for parameter in copy.computing:
            parameter.grad = torch.full_like(parameter, 2**-10)
        copy.give_gradients()
    assert all(torch.equal(p.grad, torch.full_like(p, 1000 * 2**-10)) for p in network.parameters())
    assert all(p.grad is None for p in copy.computing)


def test_a_step_moves_the_float32_weights_and_the_next_one_computes_with_them(network, views):
    copy, start = HalfPrecisionCopy(network), deepcopy(network.state_dict())
    optimizer = build_optimizer(network, replace(CONFIG, learning_rate=1e-6))  # less than bfloat16 can add to 1
    step = ordinary_step(copy, network, optimizer, FLAT, CONFIG, ALONE)
    step(views)
    assert any(not torch.equal(network.state_dict()[name], value) for name, value in start.items())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    copy.take_weights()
    for weight, half in zip(network.parameters(), copy.computing, strict=True):
        assert torch.equal(half, weight.bfloat16())
