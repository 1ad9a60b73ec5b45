"""The finetuning recipe: the `mim_finetune` block of a plans file. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nnunet_mim.errors import MiMError
from nnunet_mim.settings import check_known_keys, setting

PLANS_KEY = "mim_finetune"
NNUNET_GRAD_CLIP = 12.0
"""gradient norm at which nnU-Net's own training step clips before anything else"""
FRACTIONS = ("warmup_fraction", "decoder_first_fraction", "drop_path", "foreground_prior")
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda value: value > 0, "above 0"),
    "layer_decay": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "weight_decay": (lambda value: value >= 0, "0 or more"),
    "grad_clip": (lambda value: 0 < value <= NNUNET_GRAD_CLIP, f"above 0 and at most {NNUNET_GRAD_CLIP:g}"),
    "oversample_foreground": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    **dict.fromkeys(FRACTIONS, (lambda value: 0 <= value < 1, "0 or more and below 1")),
}
"""numbers of the recipe: whether a value is valid, and what is"""


@dataclass(frozen=True)
class FinetuneConfig:
    """Recipe of nnUNetTrainerMiM and nnUNetTrainerMiMScratch, at the top level of the plans file."""

    num_epochs: int = setting(1000, "epochs")
    iterations_per_epoch: int = setting(250, "optimiser steps per epoch")
    val_iterations_per_epoch: int = setting(50, "validation batches per epoch")
    lr: float = setting(1e-3, "peak learning rate of AdamW")
    layer_decay: float = setting(
        1.0, "learning rate of the encoder's layer at distance d from its end: lr * layer_decay ** d"
    )
    weight_decay: float = setting(0.05, "weight decay of AdamW; 0 on biases, norms and other 1-d parameters")
    warmup_fraction: float = setting(
        0.05, "share of the iterations after decoder_first_fraction in which the learning rate rises linearly"
    )
    decoder_first_fraction: float = setting(
        0.0,
        "share of all iterations, before the warm-up, in which the encoder is not trained and all else warms up "
        "(the sawtooth of OpenMind, arXiv 2412.17041); not in the control",
    )
    schedule: str = setting(
        "cosine", "fall of the learning rate to 0 after the warm-up: cosine, or poly (nnU-Net's, exponent 0.9)"
    )
    grad_clip: float = setting(1.0, "maximum gradient norm; nnU-Net itself clips at 12")
    drop_path: float = setting(0.0, "stochastic depth of the encoder's last block")
    foreground_prior: float = setting(
        0.04,
        "share of voxels that the heads' initial biases predict as foreground; 0: biases start at 0, as in nnU-Net",
    )
    oversample_foreground: float = setting(
        0.33,
        "share of patches centred on a labelled voxel, as in nnU-Net; with batch_size 1 nnU-Net rounds 0.33 to none",
    )
    deep_supervision: bool = setting(True, "losses at lower resolutions too, as in nnU-Net")
    mirror_axes: tuple[int, ...] | None = setting(
        None,
        "array axes mirrored in augmentation and prediction; none at all where images are not stored in axial slices",
        default_text="all but left-right",
    )

    def __post_init__(self) -> None:
        for name in ("num_epochs", "iterations_per_epoch", "val_iterations_per_epoch"):
            _check(name, _is_int(getattr(self, name)) and getattr(self, name) >= 1, "a whole number above 0", self)
        for name, (is_valid, wanted) in LIMITS.items():
            _check(name, _is_number(getattr(self, name)), "a number", self)
            _check(name, is_valid(getattr(self, name)), wanted, self)
        _check("schedule", self.schedule in ("cosine", "poly"), "cosine or poly", self)
        _check("deep_supervision", isinstance(self.deep_supervision, bool), "true or false", self)
        axes = self.mirror_axes
        if axes is not None:
            valid = isinstance(axes, (list, tuple)) and all(_is_int(axis) and 0 <= axis <= 2 for axis in axes)
            _check("mirror_axes", valid, "a list of axes 0, 1, 2 (or null: all but left-right)", self)
            object.__setattr__(self, "mirror_axes", tuple(sorted(set(axes))))

    @classmethod
    def from_plans(cls, plans: dict[str, Any]) -> FinetuneConfig:
        """Read `plans["mim_finetune"]`; missing settings have their defaults.

        Raises:
            MiMError: unknown key, or a value of the wrong kind.
        """
        block = plans.get(PLANS_KEY, {})
        if not isinstance(block, dict):
            raise MiMError(f"'{PLANS_KEY}' in the plans file must be a block of settings, got {block!r}")
        check_known_keys(block, [f.name for f in fields(cls)], f"'{PLANS_KEY}' in the plans file")
        return cls(**block)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def left_right_axis(transpose_forward: Sequence[int]) -> int:
    """Array axis of left-right in preprocessed data, for images stored in axial slices.

    nnU-Net reads those as (z, y, x) and then transposes; left-right is where axis 2 went.
    """
    return list(transpose_forward).index(2)


def default_mirror_axes(transpose_forward: Sequence[int]) -> tuple[int, ...]:
    """All array axes but left-right, whose mirroring would exchange left and right organs."""
    return tuple(axis for axis in range(3) if axis != left_right_axis(transpose_forward))


def _check(name: str, valid: bool, wanted: str, config: FinetuneConfig) -> None:
    if not valid:
        raise MiMError(f"{PLANS_KEY}.{name} must be {wanted}, got {getattr(config, name)!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
