"""Builds the network that the settings of a run ask for."""

from __future__ import annotations

from nnunet_mim.config import PretrainConfig
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.networks.hybrid_unet import plans_architecture
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.networks.resenc import ResEncMaskInMask

PretrainingNetwork = MaskInMask | ResEncMaskInMask
FeatureSource = HybridEncoder | ResEncMaskInMask
"""A module with `forward_features` and `token_size`, whose features a label probe reads."""


def build_network(config: PretrainConfig) -> PretrainingNetwork:
    """Build the network of pretraining with random weights.

    Raises:
        MiMError: the plans do not describe the network that `config.encoder` needs.
    """
    if config.encoder == "resenc":
        return ResEncMaskInMask(config.architecture, config.network.token_size, config.in_channels, config.alignment)
    unet = plans_architecture(config.network, config.view_size)["arch_kwargs"] if config.decoder == "unet" else None
    return MaskInMask(config.network, config.in_channels, alignment=config.alignment, unet=unet)
