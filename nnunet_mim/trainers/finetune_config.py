"""The finetuning recipe: the `mim_finetune` block of a plans file. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nnunet_mim.errors import MiMError
from nnunet_mim.settings import check_known_keys, check_value, setting

PLANS_KEY = "mim_finetune"
COUNTS = ("num_epochs", "iterations_per_epoch", "val_iterations_per_epoch")
FRACTIONS = ("warmup_fraction", "decoder_first_fraction", "drop_path", "foreground_prior")
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda value: value > 0, "above 0"),
    "layer_decay": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "weight_decay": (lambda value: value >= 0, "0 or more"),
    "schedule": (lambda value: value in ("cosine", "poly"), "cosine or poly"),
    "grad_clip": (lambda value: 0 < value <= 12, "above 0 and at most 12"),  # nnU-Net clips at 12 before
    "oversample_foreground": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    **dict.fromkeys(COUNTS, (lambda value: value >= 1, "a whole number above 0")),
    **dict.fromkeys(FRACTIONS, (lambda value: 0 <= value < 1, "0 or more and below 1")),
}
"""settings of the recipe: whether a value is valid, and what is"""


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
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.default is not None:
                check_value(f"{PLANS_KEY}.{entry.name}", value, entry.default)
            is_valid, wanted = LIMITS.get(entry.name, (lambda _: True, ""))
            if not is_valid(value):
                raise MiMError(f"{PLANS_KEY}.{entry.name} must be {wanted}, got {value!r}")
        if self.mirror_axes is not None:
            check_value(f"{PLANS_KEY}.mirror_axes", self.mirror_axes, (0, 1))
            axes = tuple(sorted(set(self.mirror_axes)))
            if not set(axes) <= {0, 1, 2}:
                raise MiMError(f"{PLANS_KEY}.mirror_axes must be axes 0, 1, 2 (null: all but left-right), got {axes}")
            object.__setattr__(self, "mirror_axes", axes)

    @classmethod
    def from_plans(cls, plans: dict[str, Any]) -> FinetuneConfig:
        """Read `plans["mim_finetune"]`; missing settings have their defaults. Raises MiMError for a bad one."""
        block = plans.get(PLANS_KEY, {})
        if not isinstance(block, dict):
            raise MiMError(f"'{PLANS_KEY}' in the plans file must be a block of settings, got {block!r}")
        check_known_keys(block, [f.name for f in fields(cls)], f"'{PLANS_KEY}' in the plans file")
        return cls(**block)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def default_mirror_axes(transpose_forward: Sequence[int]) -> tuple[int, ...]:
    """All array axes but left-right of preprocessed data, for images stored in axial slices.

    nnU-Net reads those as (z, y, x) and then transposes. Mirroring left-right would exchange left and right organs.
    """
    return tuple(axis for axis, before in enumerate(transpose_forward) if before != 2)
