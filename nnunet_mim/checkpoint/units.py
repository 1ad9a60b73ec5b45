"""What the voxels of a pretraining mean, and whether finetuning sees the same units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_mim.nnunet.intensities import CT_NORMALIZATION, WINDOW_FIELDS, Intensities

CT_GREY = (-450.0, 350.0)
"""HU shown black and white in a picture, which tell lung, fat, muscle and bone apart"""


@dataclass(frozen=True)
class Units(Intensities):
    """Intensities of the voxels that a network was pretrained on."""

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> Units:
        """The units that a checkpoint's provenance states."""
        return cls(tuple(provenance["normalization"]), provenance["intensity_properties"])

    @property
    def name(self) -> str:
        """Name of the unit in which pictures show the first channel."""
        return "HU" if self.is_ct() else "normalised intensity"

    def window(self, channel: int, voxels: np.ndarray) -> tuple[float, float]:
        """Lowest and highest normalised intensity: of the plans' window, or of `voxels` where the channel is no CT."""
        return self.normalized_window(channel) or (float(voxels.min()), float(voxels.max()))

    def grey(self, voxels: np.ndarray) -> tuple[float, float]:
        """Intensities (HU for CT) shown black and white in a picture of the first channel, whose voxels are given."""
        if (window := self.hounsfield_window()) is not None:
            low, high = max(CT_GREY[0], window[0]), min(CT_GREY[1], window[1])
            return (low, high) if low < high else window
        low, high = (float(v) for v in np.percentile(voxels, (1, 99.5)))
        return low, high if high > low else low + 1.0


def unit_differences(
    provenance: dict[str, Any], config: dict[str, Any], intensity: dict[str, Any], transpose: Sequence[int] = (0, 1, 2)
) -> list[str]:
    """What differs in the preprocessing of pretraining and finetuning, one sentence a difference.

    Args:
        provenance: of the checkpoint; what it does not state counts as equal.
        config: the plans' configuration.
        intensity: the plans' foreground_intensity_properties_per_channel.
        transpose: the plans' transpose_forward.
    """
    differences = []
    spacing, axes = provenance.get("spacing"), provenance.get("transpose_forward")
    if spacing and not np.allclose(spacing, config["spacing"], rtol=0.02):
        before, now = _rounded(spacing), _rounded(config["spacing"])
        differences.append(f"spacing (mm, the plans' order of axes): pretrained at {before}, now {now}")
    if axes and list(axes) != list(transpose):
        differences.append(f"order of axes: pretrained with {list(axes)}, now {list(transpose)}")
    schemes = provenance.get("normalization") or []
    for channel, scheme in enumerate(config["normalization_schemes"] if schemes else []):
        pretrained_channel = min(channel, len(schemes) - 1)
        if schemes[pretrained_channel] != scheme:
            differences.append(f"channel {channel}: pretrained with {schemes[pretrained_channel]}, now {scheme}")
        elif scheme == CT_NORMALIZATION:
            window = _window(provenance.get("intensity_properties") or {}, pretrained_channel)
            other = _window(intensity, channel)
            if window and not np.allclose(window, other, rtol=1e-3, atol=1e-3):
                texts = f"pretrained on {_window_text(window)}, now {_window_text(other)}"
                differences.append(f"channel {channel}: {texts}")
    return differences


def units_warning(differences: list[str]) -> str:
    """The warning about different preprocessing that finetuning prints."""
    return (
        "WARNING: pretraining and finetuning do not see the same units, which costs some of the benefit: "
        + "; ".join(differences)
        + ". Plans of `mim_plan -d DATASET -pc CHECKPOINT` keep them equal."
    )


def _window(intensity: dict[str, Any], channel: int) -> list[float]:
    properties = intensity.get(str(channel))
    return [float(properties[name]) for name in WINDOW_FIELDS] if properties else []


def _window_text(window: list[float]) -> str:
    return f"CT window {window[0]:g}…{window[1]:g} HU (mean {window[2]:g}, std {window[3]:g})"


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(v), 3) for v in values]
