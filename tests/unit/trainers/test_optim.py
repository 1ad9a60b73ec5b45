"""Learning rates and parameter groups, against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from nnunet_mim.networks.hybrid_unet import HybridUNet, plans_architecture
from nnunet_mim.trainers.finetune_config import FinetuneConfig
from nnunet_mim.trainers.optim import IterationSchedule, _depth_from_end, _parameter_groups, build_optimizer, lr_factor


@pytest.fixture
def network(network_config):
    return HybridUNet(1, 2, True, **plans_architecture(network_config, (64, 64, 64))["arch_kwargs"])


def test_warmup_then_cosine_by_hand():
    config = FinetuneConfig(warmup_fraction=0.2, schedule="cosine")
    factors = [lr_factor(i, 10, config) for i in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]  # two of ten steps warm up; the first step after them is at the peak
    assert factors[6] == pytest.approx(0.5)  # half way from 2 to 10
    assert factors[4] == pytest.approx((1 + math.sqrt(0.5)) / 2)  # a quarter of the way: cos 45°
    assert 0 < factors[9] < factors[8]
    assert lr_factor(10, 10, config) == pytest.approx(0)


def test_the_encoder_rests_while_all_else_warms_up():
    """Of 20 steps the first four belong to the decoder; then both do what they would do in 16."""
    config = FinetuneConfig(warmup_fraction=0.25, decoder_first_fraction=0.2)
    assert [lr_factor(i, 20, config) for i in range(4)] == [0, 0, 0, 0]
    assert [lr_factor(i, 20, config, encoder=False) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    plain = FinetuneConfig(warmup_fraction=0.25)
    for encoder in (True, False):
        assert [lr_factor(4 + i, 20, config, encoder) for i in range(16)] == [
            lr_factor(i, 16, plain) for i in range(16)
        ]


def test_a_resting_encoder_does_not_move(network):
    config = FinetuneConfig(num_epochs=4, iterations_per_epoch=1, decoder_first_fraction=0.5)
    optimizer, schedule = build_optimizer(network, config)
    before = {name: p.clone() for name, p in network.named_parameters()}
    for step in range(3):
        schedule.advance()
        sum(y.square().mean() for y in network(torch.randn(1, 1, 32, 32, 32))).backward()
        optimizer.step()
        moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
        assert any(not name.startswith("encoder.") for name in moved)
        assert any(name.startswith("encoder.") for name in moved) == (step == 2)


def test_poly_by_hand():
    config = FinetuneConfig(warmup_fraction=0.0, schedule="poly")
    assert lr_factor(0, 100, config) == 1.0
    assert lr_factor(25, 100, config) == pytest.approx(0.75**0.9)
    assert lr_factor(99, 100, config) == pytest.approx(0.01**0.9)


def test_every_parameter_is_in_exactly_one_group(network):
    groups = _parameter_groups(network, FinetuneConfig())
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())


def test_frozen_parameters_are_in_none(network):
    network.decoder.heads[1:].requires_grad_(False)
    grouped = {id(p) for group in _parameter_groups(network, FinetuneConfig()) for p in group["params"]}
    assert grouped == {id(p) for p in network.parameters() if p.requires_grad}
    assert len(grouped) < len(list(network.parameters()))


def test_layer_decay_and_weight_decay_by_name(network):
    config = FinetuneConfig(layer_decay=0.5, weight_decay=0.1)
    found = {id(p): g for g in _parameter_groups(network, config) for p in g["params"]}
    named = dict(network.named_parameters())
    # two transformer blocks: stage 0, 1, 2, token embedding, block 0, block 1, final norm = layers 0 … 6
    expected = {
        "encoder.stages.0.embed.proj.weight": (0.5**6, 0.1),
        "encoder.stages.0.to_token.bias": (0.5**6, 0.0),
        "encoder.stages.2.blocks.0.dwconv.weight": (0.5**4, 0.1),
        "encoder.token_proj.weight": (0.5**3, 0.1),
        "encoder.vit_blocks.0.attn.qkv.weight": (0.5**2, 0.1),
        "encoder.vit_blocks.1.norm1.weight": (0.5**1, 0.0),
        "encoder.norm.weight": (1.0, 0.0),
        "stem.conv1.0.weight": (1.0, 0.1),
        "decoder.heads.0.bias": (1.0, 0.0),
    }
    for name, (scale, decay) in expected.items():
        group = found[id(named[name])]
        assert (group["lr_scale"], group["weight_decay"]) == (scale, decay), name


def test_the_first_group_has_the_full_rate_because_nnunet_logs_it(network):
    first = _parameter_groups(network, FinetuneConfig(layer_decay=0.8))[0]
    assert (first["lr_scale"], first["encoder"]) == (1.0, False)


def test_a_parameter_of_no_known_layer_is_an_error(network):
    with pytest.raises(ValueError, match="no known layer"):
        _depth_from_end("mystery.weight", network.encoder)


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_schedule_goes_on_where_a_resumed_run_starts(network):
    config = FinetuneConfig(num_epochs=4, iterations_per_epoch=5, warmup_fraction=0.3, lr=0.1, layer_decay=0.5)
    optimizer = torch.optim.SGD(_parameter_groups(network, config), lr=1.0)
    schedule = IterationSchedule(optimizer, config)
    straight = []
    for epoch in range(4):
        schedule.step(epoch)
        for _ in range(5):
            schedule.advance()
            straight.append(rates(optimizer))
    assert [r[0] for r in straight] == pytest.approx([0.1 * lr_factor(i, 20, config) for i in range(20)])
    assert straight[3][-1] == pytest.approx(straight[3][0] * 0.5**6)

    resumed = IterationSchedule(torch.optim.SGD(_parameter_groups(network, config), lr=1.0), config)
    resumed.step(2)
    for i in range(10, 15):
        resumed.advance()
        assert rates(resumed.optimizer) == pytest.approx(straight[i])


def test_gradients_are_clipped_before_the_step(network):
    optimizer, _ = build_optimizer(network, FinetuneConfig(grad_clip=0.5))
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in network.parameters()))
    assert norm.item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_on_a_gpu_a_step_is_one_kernel(network, monkeypatch, on_gpu):
    made = {}

    class Recording(torch.optim.AdamW):
        def __init__(self, groups, lr, fused):
            made["fused"] = fused
            super().__init__(groups, lr=lr)

    monkeypatch.setattr("nnunet_mim.trainers.optim.AdamW", Recording)
    network.parameters = lambda: iter([SimpleNamespace(is_cuda=on_gpu)])
    build_optimizer(network, FinetuneConfig())
    assert made["fused"] == (True if on_gpu else None)
