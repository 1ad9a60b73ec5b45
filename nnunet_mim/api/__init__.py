"""The package from Python, for notebooks (docs/python.md)."""

from nnunet_mim.api.commands import classify, pretrain, report
from nnunet_mim.api.encoder import Encoder, features, load_encoder

__all__ = ["Encoder", "classify", "features", "load_encoder", "pretrain", "report"]
