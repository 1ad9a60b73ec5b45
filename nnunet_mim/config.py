"""Every number of a pretraining run, as frozen dataclasses. Standard library only.

Symbols as in docs/method.md: view size `V` (voxels per axis the encoder sees), token size `p` (product of the
encoder's strides), level (a field of view `fov` resized to `V`), region (the part of a view that becomes a view of the
next level).
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

from nnunet_mim.errors import MiMError

Size3 = tuple[int, int, int]


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of HybridEncoder and MiMDecoder. Defaults: the published architecture (`base`)."""

    embed_dims: tuple[int, ...] = (48, 96, 192, 384)
    """channels of the three convolution stages and of the transformer"""
    depths: tuple[int, ...] = (2, 2, 2, 11)
    """blocks per stage"""
    num_heads: int = 12
    """attention heads of the transformer stage"""
    mlp_ratio: float = 4.0
    """hidden width of every MLP, in units of its input width"""
    strides: tuple[Size3, ...] = ((2, 2, 2),) * 4
    """downsampling of each stage per axis; their product is the token size; 1 in early stages along axes with large
    spacing
    """
    decoder_embed_dim: int = 576
    """width of the decoder; divisible by its heads and by 6"""
    decoder_depth: int = 8
    """transformer blocks of the decoder"""
    decoder_num_heads: int = 16
    """attention heads of the decoder"""

    def __post_init__(self) -> None:
        if not len(self.embed_dims) == len(self.depths) == len(self.strides) == 4:
            raise MiMError(
                "embed_dims, depths and strides need four entries each: three convolution stages, a transformer"
            )
        if any(len(s) != 3 or min(s) < 1 for s in self.strides):
            raise MiMError(f"strides must be four triples of integers >= 1, got {self.strides}")
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
ALIGNMENTS = ("infonce", "cosine", "none")


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides what one `mim_pretrain` run computes. Saved in its checkpoint."""

    preset: str = "base"
    """network size: tiny, small, base or large"""
    network: NetworkConfig = None  # type: ignore[assignment]
    """sizes; default: the preset's"""
    encoder: str = "hybrid"
    """what is pretrained: hybrid (convolutions and a transformer, for nnUNetTrainerMiM) or resenc (nnU-Net's residual
    encoder U-Net as the plans describe it, for stock nnU-Net)
    """
    architecture: dict[str, Any] = field(default_factory=dict)
    """of the plans, where encoder is resenc; follows from the data"""
    in_channels: int = 1
    """image channels; follows from the data"""
    view_size: Size3 = (96, 96, 96)
    """voxels per axis that the encoder sees; a multiple of twice the token size"""
    ladder: str = "published"
    """fields of view of the levels: published (2V, V, one token) or native (4V, 2V, V)"""
    scale: Size3 = (2, 2, 2)
    """per axis 2, or 1 where the data is too thin for the outer field of view"""
    mask_ratios: tuple[float, ...] = (0.5, 0.6, 0.5)
    """per level, outermost first"""
    n_children: tuple[int, ...] = (4, 4)
    """children per parent on the edges 1-2 and 2-3"""
    alignment: str = "infonce"
    """infonce, cosine or none"""
    alignment_weight: float = 0.1
    """weight of the alignment loss per edge"""
    temperature: float = 0.2
    """of the InfoNCE logits"""
    level_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    """weight of each level's reconstruction loss; innermost levels without any loss are not computed in training"""
    flat_fraction: float = 0.005
    """a token whose standard deviation is below this share of the intensity window (10 HU of 2000) is no target"""
    init_checkpoint: str = ""
    """checkpoint of an earlier run whose weights this one starts from; empty: random weights"""
    iterations: int = 250_000
    """optimiser steps; 250 are one epoch in the logs"""
    batch_size: int = 2
    """crops an optimiser step, over all devices"""
    learning_rate: float = 2e-4
    """absolute peak learning rate"""
    warmup_fraction: float = 0.05
    """share of the iterations in which the learning rate rises linearly; a half cosine to 0 follows"""
    weight_decay: float = 0.05
    """of AdamW; not on biases, norms and other vectors"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay rates of AdamW's two moments"""
    grad_clip: float = 1.0
    """largest gradient norm"""
    body_fraction: float = 0.9
    """share of crops that are placed on a body voxel; the others anywhere"""
    dataset_temperature: float = 2.0
    """a dataset of n cases is drawn with probability proportional to n^(1/temperature): 1 draws all cases alike, more
    gives small datasets a larger share
    """
    body_children: bool = True
    """cut children from masked places with some tissue in them, as long as there are any"""
    mirror_axes: tuple[int, ...] = ()
    """array axes of random mirroring; the left-right axis (where `transpose_forward` puts 2) is better left out"""
    val_cases: int = 8
    """most cases of each dataset held out to measure the loss, where no fold decides; at most a tenth, at least one"""
    val_every: int = 250
    """iterations between two measurements on held-out crops"""
    val_crops: int = 8
    """fixed crops of held-out cases used by each measurement"""
    save_every: int = 250
    """iterations between two checkpoints"""
    probe_every: int = 1000
    """iterations between two label probes, where the data has labels; each waits for the next measurement; 0: none"""
    probe_cases: tuple[int, ...] = (6, 4)
    """labelled cases that a label probe is fitted on, and held-out ones that it is tried on"""
    max_skipped: int = 10
    """most steps among the last skip_window that may be skipped for want of a finite gradient before the run ends"""
    skip_window: int = 200
    """steps that max_skipped is counted over"""
    seed: int = 0
    """of weights, crops and masks"""

    def __post_init__(self) -> None:
        if self.network is None:
            if self.preset not in PRESETS:
                raise MiMError(f"unknown preset '{self.preset}': choose one of {', '.join(PRESETS)}")
            object.__setattr__(self, "network", PRESETS[self.preset])
        if self.encoder not in ENCODERS:
            raise MiMError(f"unknown encoder '{self.encoder}': choose one of {', '.join(ENCODERS)}")
        if self.ladder not in LADDERS:
            raise MiMError(f"unknown ladder '{self.ladder}': choose one of {', '.join(LADDERS)}")
        if self.alignment not in ALIGNMENTS:
            raise MiMError(f"unknown alignment '{self.alignment}': choose one of {', '.join(ALIGNMENTS)}")
        token = self.network.token_size
        if any(v < 2 * p or v % (2 * p) for v, p in zip(self.view_size, token, strict=True)):
            raise MiMError(f"--view {self.view_size} must be a multiple of twice the token size {token} on every axis")
        if any(s not in (1, 2) for s in self.scale):
            raise MiMError(f"--scale must be 1 or 2 per axis, got {self.scale}")
        if not set(self.mirror_axes) <= {0, 1, 2}:
            raise MiMError(f"--mirror_axes takes array axes 0, 1 and 2, got {self.mirror_axes}")
        if self.seed < 0:
            raise MiMError(f"--seed must be 0 or more, got {self.seed}")
        for name in ("iterations", "batch_size", "val_every", "save_every", "val_crops", "val_cases", "skip_window"):
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
        if len(self.mask_ratios) != 3 or len(self.level_weights) != 3 or len(self.n_children) != 2:
            raise MiMError("mask_ratios and level_weights need three entries, n_children two: one per level or edge")
        if min(self.n_children) < 1:
            raise MiMError(f"n_children must be at least 1, got {self.n_children}")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, as stored in a checkpoint (safe for `weights_only` loading)."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> PretrainConfig:
        """Inverse of `to_dict`. Raises MiMError for an unknown field."""
        _check_known(stored, cls)
        values = {name: _frozen(value) for name, value in stored.items() if name != "network"}
        if "network" in stored:
            values["network"] = network_from_dict(stored["network"])
        return cls(**values)


def network_from_dict(stored: dict[str, Any]) -> NetworkConfig:
    """NetworkConfig from the plain dict of a checkpoint or a plans file. Raises MiMError for an unknown field."""
    _check_known(stored, NetworkConfig)
    return NetworkConfig(**{name: _frozen(value) for name, value in stored.items()})


def _check_known(stored: dict[str, Any], cls: type) -> None:
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(stored) - known):
        raise MiMError(f"unknown settings {', '.join(unknown)}: written by another version of nnunet_mim")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (tuple, list)) else value


def field_notes(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, in one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    notes = {}
    for entry, note in pairwise(body):
        if isinstance(entry, ast.AnnAssign) and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant):
            notes[entry.target.id] = " ".join(str(note.value.value).split())  # type: ignore[union-attr]
    return notes
