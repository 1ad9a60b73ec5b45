"""Builds the network that the settings of a run ask for."""

from __future__ import annotations

from nnunet_mim.config import PretrainConfig
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.networks.resenc import ResEncMaskInMask

PretrainingNetwork = MaskInMask | ResEncMaskInMask
FeatureSource = HybridEncoder | ResEncMaskInMask
"""A module with `forward_features` and `token_size`, whose features a label probe reads."""


def build_network(config: PretrainConfig, alignment: str | None = None) -> PretrainingNetwork:
    """Build the network of pretraining with random weights.

    Args:
        config: settings of the run.
        alignment: replaces the alignment of the settings.

    Raises:
        MiMError: the plans do not describe the network that `config.encoder` needs.
    """
    alignment = config.alignment if alignment is None else alignment
    if config.encoder == "resenc":
        return ResEncMaskInMask(
            config.architecture, config.network.token_size, config.in_channels, alignment=alignment
        )
    return MaskInMask(config.network, config.in_channels, alignment=alignment)
