"""Every number of a pretraining run, as frozen dataclasses. Standard library only.

Symbols as in docs/method.md: view size `V` (voxels per axis the encoder sees), token size `p` (product of the
encoder's strides), level (a field of view `fov` resized to `V`), region (the part of a view that becomes a view of the
next level).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nnunet_mim.errors import MiMError, printable
from nnunet_mim.settings import check_value, setting

Size3 = tuple[int, int, int]
CHECKPOINTS = (
    "checkpoint_final.pth of mim_pretrain, folder of mim_export, weights that come with the package (tiny-ct), or "
    "repository on Hugging Face (USER/NAME)"
)
"""what stands for a pretraining in every command, for the help; `locate` in checkpoint/locate.py finds it"""
LARGEST_WIDTH, LARGEST_DEPTH, LARGEST_MLP_RATIO, LARGEST_STRIDE = 2048, 64, 16, 4
"""of a stage of a network: channels, blocks, hidden width by width, and downsampling per axis; the largest preset has
768, 11, 4 and 2"""


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of HybridEncoder and MiMDecoder. Defaults: the published architecture (`base`)."""

    embed_dims: tuple[int, ...] = setting(
        (48, 96, 192, 384), "channels of the three convolution stages and of the transformer"
    )
    depths: tuple[int, ...] = setting((2, 2, 2, 11), "blocks per stage")
    num_heads: int = setting(12, "attention heads of the transformer stage")
    mlp_ratio: float = setting(4.0, "hidden width of every MLP, in units of its input width")
    strides: tuple[Size3, ...] = setting(
        ((2, 2, 2),) * 4,
        "downsampling of each stage per axis; their product is the token size; 1 in early stages along axes with large "
        "spacing",
    )
    decoder_embed_dim: int = setting(576, "width of the decoder; divisible by its heads and by 6")
    decoder_depth: int = setting(8, "transformer blocks of the decoder")
    decoder_num_heads: int = setting(16, "attention heads of the decoder")

    def __post_init__(self) -> None:
        numbers = (*self.embed_dims, *self.depths, self.num_heads, self.decoder_num_heads)
        if min(numbers) < 1 or self.decoder_depth < 0 or not 0 < self.mlp_ratio < math.inf:
            raise MiMError("the sizes of a network must be above 0")
        widths, depths = (*self.embed_dims, self.decoder_embed_dim), (*self.depths, self.decoder_depth)
        if max(widths) > LARGEST_WIDTH or max(depths) > LARGEST_DEPTH or self.mlp_ratio > LARGEST_MLP_RATIO:
            raise MiMError(
                f"a network has at most {LARGEST_WIDTH} channels, {LARGEST_DEPTH} blocks per stage and an mlp_ratio of "
                f"{LARGEST_MLP_RATIO}: correct the sizes"
            )
        if not len(self.embed_dims) == len(self.depths) == len(self.strides) == 4:
            raise MiMError(
                "embed_dims, depths and strides need four entries each: three convolution stages, a transformer"
            )
        if any(len(s) != 3 or min(s) < 1 or max(s) > LARGEST_STRIDE for s in self.strides):
            raise MiMError(f"strides must be four triples of integers from 1 to {LARGEST_STRIDE}, got {self.strides}")
        for name, dim, heads in (
            ("encoder", self.embed_dims[-1], self.num_heads),
            ("decoder", self.decoder_embed_dim, self.decoder_num_heads),
        ):
            if dim % heads or dim % 6:
                raise MiMError(
                    f"{name} width {dim} must be divisible by its {heads} heads and by 6 (3 axes, sin and cos)"
                )

    @property
    def token_size(self) -> Size3:
        """Voxels of one token per axis."""
        return tuple(math.prod(s[axis] for s in self.strides) for axis in range(3))  # type: ignore[return-value]


PRESETS: dict[str, NetworkConfig] = {
    "tiny": NetworkConfig((12, 24, 48, 96), num_heads=3, decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=6),
    "small": NetworkConfig((24, 48, 96, 192), num_heads=6, decoder_embed_dim=288, decoder_depth=4, decoder_num_heads=6),
    "base": NetworkConfig(),
    "large": NetworkConfig((96, 192, 384, 768), num_heads=12),
}

DEFAULT_LEARNING_RATE = {"tiny": 5e-4, "small": 5e-4, "base": 2e-4, "large": 2e-4}


@dataclass(frozen=True)
class LevelConfig:
    """One level of the ladder, outermost first."""

    fov: Size3
    """field of view: the box, in voxels of the preprocessed volume, that is resized to the view size"""
    mask_ratio: float
    """share of regions (where regions are larger than a token) or of tokens that is masked"""
    n_children: int
    """views of the next level cut from masked places of one view of this level; 0 on the last level"""

    def __post_init__(self) -> None:
        if not 0.0 < self.mask_ratio < 1.0:
            raise MiMError(f"mask ratio must lie between 0 and 1, got {self.mask_ratio}")


LADDERS = ("published", "native")
ENCODERS = ("hybrid", "resenc")
DECODERS = ("mim", "unet")
ALIGNMENTS = ("infonce", "cosine", "none")

FLAT_FRACTION = 0.005
"""a token whose standard deviation is below this share of the intensity window is no target: 10 HU of 2000, air"""
LARGEST_VIEW = 512
"""voxels per axis; a view of 512 has 150 times the voxels of one of 96"""
LARGEST_FAMILY = 64
"""children of a view; 64 64 would make 4,161 views of a crop"""
SKIP_WINDOW = 200
"""steps that `max_skipped` is counted over"""
RETIRED = {"flat_fraction": FLAT_FRACTION, "skip_window": SKIP_WINDOW}
"""settings of former versions that are constants now; checkpoints of theirs still hold them"""


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides what one `mim_pretrain` run computes. Saved in its checkpoint."""

    preset: str = setting(
        "base",
        "network size: tiny, small, base (as published) or large",
        "--preset",
        default_text="that of MiM plans, else base",
        choices=list(PRESETS),
    )
    network: NetworkConfig = None  # type: ignore[assignment]
    """sizes; default: the preset's"""
    encoder: str = setting(
        "hybrid",
        "what is pretrained: hybrid (convolutions and a transformer, for nnUNetTrainerMiM) or resenc (nnU-Net's "
        "residual encoder U-Net as the plans describe it, for nnUNetv2_train with -pretrained_weights)",
        "--encoder",
        choices=ENCODERS,
    )
    architecture: dict[str, Any] = field(default_factory=dict)
    """of the plans, where encoder is resenc; follows from the data"""
    decoder: str = setting(
        "mim",
        "what learns beside a hybrid encoder: mim (MiM's decoder alone, which finetuning does not use) or unet (also "
        "all of nnUNetTrainerMiM's U-Net but its heads, by reconstruction)",
        "--decoder",
        choices=DECODERS,
    )
    decoder_phase: float = setting(
        1.0, "share of the iterations, the last ones, in which the U-Net of --decoder unet learns", "--decoder_phase"
    )
    unet_every: int = setting(2, "iterations from one in which the U-Net learns to the next")
    unet_views: tuple[int, ...] = setting(
        (0, 1, 0), "views per crop that the U-Net reconstructs in these, of level 1, 2 and 3"
    )
    unet_weight: float = setting(1.0, "weight of the U-Net's reconstruction loss; 0: it is not computed")
    in_channels: int = 1
    """image channels; follows from the data"""
    view_size: Size3 = setting(
        (96, 96, 96),
        "voxels per axis that the encoder sees, one number or three; a multiple of twice the token size, at most 512",
        "--view",
        default_text="by the size of the cases, at most 96",
        nargs="+",
        metavar="V",
    )
    ladder: str = setting(
        "published",
        "fields of view of the levels: published (2V, V, one token) or native (4V, 2V, V)",
        "--ladder",
        choices=LADDERS,
    )
    scale: Size3 = setting(
        (2, 2, 2),
        "factor between levels per axis: 2, or 1 where the data is too thin for the outer field of view",
        "--scale",
        default_text="2, or 1 where the cases are too thin",
    )
    mask_ratios: tuple[float, ...] = setting(
        (0.5, 0.6, 0.5), "masked share per level, outermost first", "--mask_ratios"
    )
    n_children: tuple[int, ...] = setting(
        (4, 4), "views cut from each view of level 1 and of level 2; 4 4 makes 21 views per crop", "--children"
    )
    alignment: str = setting(
        "infonce", "loss between levels: infonce, cosine or none", "--alignment", choices=ALIGNMENTS
    )
    alignment_weight: float = setting(0.1, "weight of the alignment loss per edge")
    temperature: float = setting(0.2, "temperature of the InfoNCE logits")
    level_weights: tuple[float, ...] = setting(
        (1.0, 1.0, 1.0),
        "weight of each level's reconstruction loss; innermost levels without any loss are not computed in training",
    )
    init_checkpoint: str = setting(
        "",
        f"earlier run whose weights this one starts from: {CHECKPOINTS}",
        "--init",
        default_text="random weights",
        metavar="CHECKPOINT",
    )
    iterations: int = setting(250_000, "optimiser steps; 250 are one epoch in the logs", "--iterations")
    batch_size: int = setting(2, "crops per optimiser step, over all devices", "--batch")
    learning_rate: float = setting(
        2e-4,
        "absolute peak learning rate",
        "--lr",
        default_text="by preset: 5e-4 for tiny and small, 2e-4 for base and large",
    )
    warmup_fraction: float = setting(
        0.05,
        "share of the iterations in which the learning rate rises linearly; a half cosine to 0 follows",
    )
    weight_decay: float = setting(0.05, "weight decay of AdamW; not on biases, norms and other vectors")
    betas: tuple[float, float] = setting((0.9, 0.95), "decay rates of AdamW's two moments")
    grad_clip: float = setting(1.0, "maximum gradient norm")
    body_fraction: float = setting(0.9, "share of crops that are placed on a body voxel; the others lie anywhere")
    dataset_temperature: float = setting(
        2.0,
        "a dataset of n cases is drawn with probability proportional to n^(1/temperature): 1 draws all cases alike, "
        "more gives small datasets a larger share",
    )
    body_children: bool = setting(
        True, "cut children from masked places with some tissue in them, as long as there are any"
    )
    mirror_axes: tuple[int, ...] = setting(
        (),
        "array axes (0 1 2) of random mirroring; leave out the left-right axis, which is 2 unless the plans' "
        "transpose_forward moved it",
        "--mirror_axes",
        default_text="none",
        metavar="A",
    )
    val_cases: int = setting(
        8,
        "maximum number of cases of each dataset that are held out, where no fold decides; at most a tenth, at least "
        "one",
    )
    val_every: int = setting(250, "iterations between two measurements on held-out crops", "--val_every")
    val_crops: int = setting(8, "fixed crops of held-out cases used by each measurement")
    save_every: int = setting(250, "iterations between two checkpoints", "--save_every")
    probe_every: int = setting(
        1000,
        "iterations between two label probes, where the data has labels; each waits for the next measurement; 0: none",
    )
    probe_cases: tuple[int, ...] = setting(
        (6, 4), "labelled cases that a label probe is fitted on, and held-out ones that it is tried on"
    )
    max_skipped: int = setting(
        10,
        "maximum number of the last 200 steps that may be skipped for want of a finite gradient before the run ends",
    )
    seed: int = setting(0, "seed of weights, crops and masks", "--seed")

    def __post_init__(self) -> None:
        if self.network is None:
            if self.preset not in PRESETS:
                raise MiMError(f"unknown preset '{printable(self.preset)}': choose one of {', '.join(PRESETS)}")
            object.__setattr__(self, "network", PRESETS[self.preset])
        named = (("encoder", ENCODERS), ("decoder", DECODERS), ("ladder", LADDERS), ("alignment", ALIGNMENTS))
        for name, choices in named:
            if getattr(self, name) not in choices:
                given = printable(getattr(self, name))
                raise MiMError(f"unknown {name} '{given}': choose one of {', '.join(choices)}")
        if len(self.view_size) != 3 or len(self.scale) != 3 or len(self.betas) != 2 or self.in_channels < 1:
            raise MiMError("--view and --scale need three numbers, betas two, and in_channels is at least 1")
        token = self.network.token_size
        if any(v < 2 * p or v % (2 * p) for v, p in zip(self.view_size, token, strict=True)):
            view = f"--view {self.view_size} (the plans' order of axes)"
            raise MiMError(f"{view} must be a multiple of twice the token size {token} on every axis")
        check_view_size(self.view_size)
        if any(s not in (1, 2) for s in self.scale):
            raise MiMError(f"--scale must be 1 or 2 per axis, got {self.scale} (the plans' order of axes)")
        if not set(self.mirror_axes) <= {0, 1, 2}:
            raise MiMError(f"--mirror_axes takes array axes 0, 1 and 2, got {self.mirror_axes}")
        if self.seed < 0:
            raise MiMError(f"--seed must be 0 or more, got {self.seed}")
        if (self.encoder, self.decoder) == ("resenc", "unet"):
            raise MiMError("--decoder unet is for --encoder hybrid: of a residual encoder U-Net all learns without it")
        if not 0 < self.decoder_phase <= 1:
            raise MiMError(f"--decoder_phase must be above 0 and at most 1, got {self.decoder_phase}")
        if len(self.unet_views) != 3 or min(self.unet_views) < 0 or max(self.unet_views) < 1 or self.unet_weight < 0:
            raise MiMError("unet_views needs three numbers, 0 or more and one of them above 0; unet_weight 0 or more")
        for name in ("iterations", "batch_size", "val_every", "save_every", "val_crops", "val_cases", "unet_every"):
            if getattr(self, name) < 1:
                raise MiMError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dataset_temperature <= 0:
            raise MiMError(f"dataset_temperature must be above 0, got {self.dataset_temperature}")
        if self.probe_every < 0 or self.max_skipped < 0:
            raise MiMError("probe_every and max_skipped must be 0 or more")
        if len(self.probe_cases) != 2 or min(self.probe_cases) < 1:
            raise MiMError(f"probe_cases needs two numbers above 0, got {self.probe_cases}")
        if self.learning_rate <= 0 or not 0 <= self.warmup_fraction < 1:
            raise MiMError("learning_rate must be above 0 and warmup_fraction in [0, 1)")
        if not (self.weight_decay >= 0 and self.grad_clip > 0 and 0 <= self.body_fraction <= 1):
            raise MiMError("weight_decay must be 0 or more, grad_clip above 0 and body_fraction in [0, 1]")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise MiMError(f"betas must be in [0, 1), got {self.betas}")
        if not (self.temperature > 0 and self.alignment_weight >= 0):
            raise MiMError("temperature must be above 0 and alignment_weight 0 or more")
        if len(self.mask_ratios) != 3 or len(self.level_weights) != 3 or len(self.n_children) != 2:
            raise MiMError("mask_ratios and level_weights need three entries, n_children two: one per level or edge")
        if min(self.n_children) < 1 or max(self.n_children) > LARGEST_FAMILY:
            raise MiMError(f"n_children must be from 1 to {LARGEST_FAMILY}, got {self.n_children}")
        if min(self.level_weights) < 0 or not all(0 < ratio < 1 for ratio in self.mask_ratios):
            raise MiMError("level_weights must be 0 or more, and every mask ratio above 0 and below 1")

    @property
    def unet_begins(self) -> int:
        """First iteration in which the U-Net learns."""
        return self.iterations - max(1, round(self.iterations * self.decoder_phase))

    def unet_learns(self, iteration: int) -> bool:
        """Whether the U-Net learns in an iteration."""
        since = iteration - self.unet_begins
        return self.decoder == "unet" and self.unet_weight > 0 and since >= 0 and since % self.unet_every == 0

    def unet_levels(self, n_levels: int) -> list[int]:
        """Numbers of the levels that the U-Net sees, where there are n_levels."""
        return [number for number in range(4 - n_levels, 4) if self.unet_views[number - 1]]

    def levels_that_count(self, n_levels: int) -> int:
        """Number of levels that training has to compute: those after the last one with a weight are left out."""
        aligned = self.alignment != "none" and self.alignment_weight > 0
        weights = self.level_weights[-n_levels:]
        return max((n + 1 for n in range(n_levels) if weights[n] > 0 or (aligned and n > 0)), default=n_levels)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, as stored in a checkpoint (safe for `weights_only` loading)."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> PretrainConfig:
        """Inverse of `to_dict`. Raises MiMError for an unknown field."""
        stored = without_retired(stored)
        _check_known(stored, cls)
        values = {name: _frozen(value) for name, value in stored.items() if name != "network"}
        for entry in fields(cls):
            if entry.name in values and entry.name != "network":
                default = {} if entry.name == "architecture" else entry.default
                check_value(entry.name, values[entry.name], default)
        if "network" in stored:
            values["network"] = network_from_dict(stored["network"])
        try:
            return cls(**values)
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
            raise MiMError(f"the settings cannot be used ({type(error).__name__}: {printable(error)})") from error


def check_view_size(view_size: Any) -> None:
    """Raise MiMError unless there are three whole numbers, none above LARGEST_VIEW."""
    if len(view_size) != 3 or not all(type(n) is int and n <= LARGEST_VIEW for n in view_size):
        shown = printable(repr(view_size), 60)
        raise MiMError(f"view_size must be three whole numbers of at most {LARGEST_VIEW} voxels, got {shown}")


def without_retired(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those of former versions that are constants now. Raises MiMError where one has another value."""
    for name, value in RETIRED.items():
        if settings.get(name, value) != value:
            raise MiMError(
                f"setting {name} can only be {value} in this version of nnunet_mim, not {printable(settings[name])}"
            )
    return {name: value for name, value in settings.items() if name not in RETIRED}


def network_from_dict(stored: dict[str, Any]) -> NetworkConfig:
    """NetworkConfig from the plain dict of a checkpoint or a plans file. Raises MiMError for an unknown field."""
    _check_known(stored, NetworkConfig)
    for entry in fields(NetworkConfig):
        check_value(entry.name, stored.get(entry.name, entry.default), entry.default)
    return NetworkConfig(**{name: _frozen(value) for name, value in stored.items()})


def _check_known(stored: dict[str, Any], cls: type) -> None:
    known = {f.name for f in fields(cls)}
    if unknown := sorted(map(str, set(stored) - known)):
        raise MiMError(f"unknown settings {printable(', '.join(unknown))}: written by another version of nnunet_mim")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (tuple, list)) else value
