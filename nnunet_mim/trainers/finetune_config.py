"""The `mim_finetune` block of a plans file: every number of a finetuning run. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nnunet_mim.errors import MiMError

PLANS_KEY = "mim_finetune"
NNUNET_GRAD_CLIP = 12.0
"""gradient norm at which nnU-Net's own training step clips before anything else"""


@dataclass(frozen=True)
class FinetuneConfig:
    """Recipe of nnUNetTrainerMiM and nnUNetTrainerMiMScratch; lives at the top level of the plans file."""

    num_epochs: int = 1000
    iterations_per_epoch: int = 250
    val_iterations_per_epoch: int = 50
    lr: float = 1e-3
    """peak learning rate"""
    layer_decay: float = 1.0
    """the encoder's layer at distance d from its end learns with lr * layer_decay ** d; 1.0: all with lr"""
    weight_decay: float = 0.05
    """of AdamW; not on biases, norms and other 1-d parameters"""
    warmup_fraction: float = 0.05
    """share of the iterations (after those of decoder_first_fraction) in which the learning rate rises linearly"""
    decoder_first_fraction: float = 0.0
    """share of all iterations, before the warm-up, in which the encoder rests and all else warms up (OpenMind's
    sawtooth, arXiv 2412.17041)"""
    schedule: str = "cosine"
    """after the warm-up: cosine, or poly (exponent 0.9, nnU-Net's); both end at 0"""
    grad_clip: float = 1.0
    """largest gradient norm, at most 12 (nnU-Net clips there already)"""
    drop_path: float = 0.0
    """stochastic depth of the encoder's last block"""
    foreground_prior: float = 0.04
    """share of voxels that the heads' biases call foreground at first; 0: they start at 0, as nnU-Net's"""
    oversample_foreground: float = 0.33
    """share of patches centred on a labelled voxel, as in nnU-Net; raise it for small organs and short schedules (with
    batch_size 1 nnU-Net's rounding makes 0.33 none at all)"""
    deep_supervision: bool = True
    mirror_axes: tuple[int, ...] | None = None
    """mirrored in augmentation and prediction; axes of the preprocessed arrays; None: all but left-right (none at
    all if images are not stored in axial slices: resolve_plans)"""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "iterations_per_epoch", "val_iterations_per_epoch"):
            _check(name, _is_int(getattr(self, name)) and getattr(self, name) >= 1, "a whole number above 0", self)
        numbers = (
            "lr",
            "layer_decay",
            "weight_decay",
            "warmup_fraction",
            "decoder_first_fraction",
            "grad_clip",
            "drop_path",
        )
        for name in (*numbers, "oversample_foreground", "foreground_prior"):
            _check(name, _is_number(getattr(self, name)), "a number", self)
        _check("lr", self.lr > 0, "above 0", self)
        _check("layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1", self)
        _check("weight_decay", self.weight_decay >= 0, "0 or more", self)
        _check("warmup_fraction", 0 <= self.warmup_fraction < 1, "0 or more and below 1", self)
        _check("decoder_first_fraction", 0 <= self.decoder_first_fraction < 1, "0 or more and below 1", self)
        _check("grad_clip", 0 < self.grad_clip <= NNUNET_GRAD_CLIP, f"above 0 and at most {NNUNET_GRAD_CLIP:g}", self)
        _check("drop_path", 0 <= self.drop_path < 1, "0 or more and below 1", self)
        _check("foreground_prior", 0 <= self.foreground_prior < 1, "0 or more and below 1", self)
        _check("oversample_foreground", 0 <= self.oversample_foreground <= 1, "between 0 and 1", self)
        _check("schedule", self.schedule in ("cosine", "poly"), "cosine or poly", self)
        _check("deep_supervision", isinstance(self.deep_supervision, bool), "true or false", self)
        if self.mirror_axes is not None:
            valid = isinstance(self.mirror_axes, (list, tuple)) and all(
                _is_int(a) and 0 <= a <= 2 for a in self.mirror_axes
            )
            _check("mirror_axes", valid, "a list of axes 0, 1, 2 (or null: all but left-right)", self)
            object.__setattr__(self, "mirror_axes", tuple(sorted(set(self.mirror_axes))))

    @classmethod
    def from_plans(cls, plans: dict[str, Any]) -> FinetuneConfig:
        """Read `plans["mim_finetune"]`; what is missing there has its default.

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


def without_rest(config: FinetuneConfig) -> FinetuneConfig:
    """The same recipe without the first phase in which the encoder rests."""
    return replace(config, decoder_first_fraction=0.0)


def check_known_keys(given: Sequence[str] | dict[str, Any], known: Sequence[str], where: str) -> None:
    """Raise MiMError naming the first unknown key, with the nearest known one if there is one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise MiMError(f"unknown setting '{key}' in {where}: {hint}")


def left_right_axis(transpose_forward: Sequence[int]) -> int:
    """Array axis of left-right in preprocessed data.

    nnU-Net's readers give (z, y, x) for images stored in the usual axial order, and the plans then transpose; so it is
    wherever axis 2 went.
    """
    return list(transpose_forward).index(2)


def default_mirror_axes(transpose_forward: Sequence[int]) -> tuple[int, ...]:
    """All array axes but left-right: mirroring that one would teach that left and right organs are the same."""
    return tuple(axis for axis in range(3) if axis != left_right_axis(transpose_forward))


def _check(name: str, valid: bool, wanted: str, config: FinetuneConfig) -> None:
    if not valid:
        raise MiMError(f"{PLANS_KEY}.{name} must be {wanted}, got {getattr(config, name)!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
