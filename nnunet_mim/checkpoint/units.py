"""What normalised voxels mean, from what a checkpoint says about its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

CT = "CTNormalization"
CT_GREY = (-450.0, 350.0)
"""HU that are black and white in a picture: lung, fat, muscle and bone can be told apart"""

WIDE_CT_WINDOW = {
    "percentile_00_5": -1000.0,
    "percentile_99_5": 1000.0,
    "mean": 0.0,
    "std": 250.0,
    "min": -1000.0,
    "max": 1000.0,
    "median": 0.0,
}
"""HU. CTNormalization clips at the percentiles, subtracts the mean, divides by std; nothing reads the last three."""

@dataclass(frozen=True)
class Units:
    """Intensities of the voxels that a network was pretrained on."""

    normalization: tuple[str, ...]
    """nnU-Net's scheme per channel"""
    properties: Mapping[str, Mapping[str, float]]
    """per channel, from the plans: the window and scale that CTNormalization uses, HU"""

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> Units:
        """Those of a checkpoint."""
        return cls(tuple(provenance["normalization"]), provenance["intensity_properties"])

    def is_ct(self, channel: int = 0) -> bool:
        return self.normalization[channel] == CT

    @property
    def name(self) -> str:
        """Of what pictures of the first channel show."""
        return "HU" if self.is_ct() else "normalised intensity"

    def scale(self, channel: int = 0) -> tuple[float, float]:
        """(std, mean): HU = voxel * std + mean. (1, 0) where the channel is no CT."""
        if not self.is_ct(channel):
            return 1.0, 0.0
        properties = self.properties[str(channel)]
        return float(properties["std"]), float(properties["mean"])

    def hounsfield_window(self, channel: int = 0) -> tuple[float, float] | None:
        """HU that CT is clipped to; None where the channel is no CT."""
        if not self.is_ct(channel):
            return None
        properties = self.properties[str(channel)]
        return float(properties["percentile_00_5"]), float(properties["percentile_99_5"])

    def window(self, channel: int, voxels: np.ndarray) -> tuple[float, float]:
        """Lowest and highest normalised intensity: of the plans' window, or of `voxels` where the channel is no CT."""
        if (window := self.hounsfield_window(channel)) is None:
            return float(voxels.min()), float(voxels.max())
        std, mean = self.scale(channel)
        return (window[0] - mean) / std, (window[1] - mean) / std

    def grey(self, voxels: np.ndarray) -> tuple[float, float]:
        """What to show black and white, HU for CT.

        Args:
            voxels: normalised, of the first channel.
        """
        if (window := self.hounsfield_window()) is not None:
            low, high = max(CT_GREY[0], window[0]), min(CT_GREY[1], window[1])
            return (low, high) if low < high else window
        low, high = (float(v) for v in np.percentile(voxels, (1, 99.5)))
        return low, high if high > low else low + 1.0
