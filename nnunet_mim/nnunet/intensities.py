"""What normalised voxels mean in Hounsfield units (HU), from nnU-Net's plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CT_NORMALIZATION = "CTNormalization"
"""nnU-Net's scheme for CT: it clips at the two percentiles, subtracts the mean and divides by the standard deviation"""

WINDOW_FIELDS = ("percentile_00_5", "percentile_99_5", "mean", "std")
"""the intensity properties of a channel (HU) that CTNormalization uses"""

WIDE_CT_WINDOW = {
    "percentile_00_5": -1000.0,
    "percentile_99_5": 1000.0,
    "mean": 0.0,
    "std": 250.0,
    "min": -1000.0,
    "max": 1000.0,
    "median": 0.0,
}
"""intensity properties of the plans of this package, HU; nothing reads the last three"""


@dataclass(frozen=True)
class Intensities:
    """How the channels of preprocessed cases were normalised."""

    normalization: tuple[str, ...]
    """nnU-Net's scheme per channel"""
    properties: Mapping[str, Mapping[str, float]]
    """nnU-Net's foreground_intensity_properties_per_channel: WINDOW_FIELDS by channel number, HU"""

    def is_ct(self, channel: int = 0) -> bool:
        """Whether a channel is normalised as CT."""
        return self.normalization[channel] == CT_NORMALIZATION

    def scale(self, channel: int = 0) -> tuple[float, float]:
        """(std, mean) of a channel: HU = voxel * std + mean. (1, 0) where the channel is no CT."""
        if not self.is_ct(channel):
            return 1.0, 0.0
        properties = self.properties[str(channel)]
        return float(properties["std"]), float(properties["mean"])

    def hounsfield_window(self, channel: int = 0) -> tuple[float, float] | None:
        """Lowest and highest HU that a channel is clipped to; None where the channel is no CT."""
        if not self.is_ct(channel):
            return None
        properties = self.properties[str(channel)]
        return float(properties["percentile_00_5"]), float(properties["percentile_99_5"])

    def normalized_window(self, channel: int = 0) -> tuple[float, float] | None:
        """Lowest and highest normalised intensity of a channel; None where the channel is no CT."""
        if (window := self.hounsfield_window(channel)) is None:
            return None
        std, mean = self.scale(channel)
        return (window[0] - mean) / std, (window[1] - mean) / std
