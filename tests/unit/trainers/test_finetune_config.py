"""The `mim_finetune` block: defaults, round trip, one-line errors."""

import json

import pytest

from nnunet_mim.errors import MiMError
from nnunet_mim.trainers.finetune_config import FinetuneConfig, default_mirror_axes


def test_plans_without_the_block_give_the_defaults():
    assert FinetuneConfig.from_plans({}) == FinetuneConfig()


def test_round_trip_through_json():
    config = FinetuneConfig(num_epochs=3, lr=2e-4, mirror_axes=(1, 0))
    stored = json.loads(json.dumps({"mim_finetune": config.to_dict()}))
    assert FinetuneConfig.from_plans(stored) == config
    assert config.mirror_axes == (0, 1)


def test_unknown_key_names_the_nearest():
    with pytest.raises(MiMError, match=r"unknown setting 'epochs'.*did you mean 'num_epochs'"):
        FinetuneConfig.from_plans({"mim_finetune": {"epochs": 3}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_epochs", 0), ("num_epochs", 1.5), ("num_epochs", True), ("lr", 0), ("lr", "fast"), ("layer_decay", 1.1),
        ("warmup_fraction", 1), ("weight_decay", -1), ("schedule", "step"), ("grad_clip", 13), ("drop_path", 1.0),
        ("oversample_foreground", 1.5), ("deep_supervision", 1), ("mirror_axes", [3]), ("mirror_axes", 2),
        ("iterations_per_epoch", None), ("foreground_prior", 1), ("foreground_prior", -0.1),
    ],
)  # fmt: skip
def test_bad_values_name_the_field(name, value):
    with pytest.raises(MiMError, match=rf"mim_finetune\.{name}'? must be"):
        FinetuneConfig(**{name: value})


def test_a_block_that_is_no_block():
    with pytest.raises(MiMError, match="block of settings"):
        FinetuneConfig.from_plans({"mim_finetune": 5})


@pytest.mark.parametrize(("transpose", "others"), [([0, 1, 2], (0, 1)), ([1, 0, 2], (0, 1)), ([2, 0, 1], (1, 2))])
def test_left_right_follows_the_transposition(transpose, others):
    assert default_mirror_axes(transpose) == others
