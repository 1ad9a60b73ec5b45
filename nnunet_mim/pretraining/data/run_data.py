"""What a run trains on."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_mim.nnunet.source import Source
from nnunet_mim.pretraining.data.crops import Cases


@dataclass(frozen=True)
class RunData:
    """What a run trains on, and the intensities that the losses need."""

    sources: list[Source]
    train: Cases
    val: Cases
    fold: int | str
    fill: tuple[float, ...]
    """per channel, the window's minimum"""
    flat_threshold: tuple[float, ...]
    """per channel, standard deviation below which a token is no target"""
    width: tuple[float, ...]
    """per channel, the window's largest minus its smallest intensity"""
