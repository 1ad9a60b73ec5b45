"""The network that a run's settings ask for."""

from __future__ import annotations

from nnunet_mim.config import PretrainConfig
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.networks.resenc import ResEncMaskInMask

PretrainingNetwork = MaskInMask | ResEncMaskInMask
FeatureSource = HybridEncoder | ResEncMaskInMask
"""has `forward_features` and `token_size`"""


def build_network(config: PretrainConfig, alignment: str | None = None) -> PretrainingNetwork:
    """A network with random weights.

    Args:
        config: of the run.
        alignment: in place of the config's.

    Raises:
        MiMError: the architecture in the config is not the one that its encoder needs.
    """
    alignment = config.alignment if alignment is None else alignment
    if config.encoder == "resenc":
        token_size, channels = config.network.token_size, config.in_channels
        return ResEncMaskInMask(config.architecture, token_size, channels, alignment=alignment)
    return MaskInMask(config.network, config.in_channels, alignment=alignment)
