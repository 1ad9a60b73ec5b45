"""A pretrained encoder as a module that knows which images it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_mim.checkpoint.format import PretrainedCheckpoint, load_checkpoint
from nnunet_mim.checkpoint.locate import INSTALL, locate
from nnunet_mim.checkpoint.share import export
from nnunet_mim.classification.features import pooled_maps
from nnunet_mim.classification.options import LARGEST_WINDOW
from nnunet_mim.classification.regions import CaseVoxels, cut_regions
from nnunet_mim.errors import MiMError
from nnunet_mim.inspection.ct import preprocess
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.nnunet.components import check_name
from nnunet_mim.nnunet.image_files import READER
from nnunet_mim.nnunet.raw_image import GIVE, Grid, RawImage
from nnunet_mim.nnunet.reading import read_voxels
from nnunet_mim.pretraining.report.card import model_card
from nnunet_mim.pretraining.report.summary import Facts
from nnunet_mim.system.guarded import Failure

try:
    from huggingface_hub import ModelHubMixin as _Hub
except ImportError:

    class _Hub:  # type: ignore[no-redef]
        def push_to_hub(self, *_: Any, **__: Any) -> Any:
            raise MiMError(f"huggingface_hub is missing: {INSTALL}")

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            raise MiMError(f"huggingface_hub is missing: {INSTALL}")


class Encoder(nn.Module, _Hub):
    """A pretrained encoder. `load_encoder` makes one, and so does `Encoder.from_pretrained("user/name")`.

    Args:
        checkpoint: a file, a folder, a name of shipped weights or of a repository, see `locate`.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        super().__init__()
        loaded = PretrainedCheckpoint.load(checkpoint)
        self.checkpoint = loaded.path
        self.in_channels = loaded.in_channels
        self.token_size = loaded.network.token_size
        """voxels per axis that inputs are multiples of"""
        self.dims = tuple(loaded.network.embed_dims)
        """channels of the four maps"""
        self.provenance = loaded.provenance
        """what it was trained on, docs/checkpoint.md"""
        self.encoder = HybridEncoder(loaded.in_channels, loaded.network)
        self.encoder.load_state_dict(loaded.encoder)
        self.eval()

    @property
    def spacing(self) -> tuple[float, ...]:
        """Millimetres between the voxels it was trained on, array order; empty where that is unknown."""
        return tuple(self.provenance["spacing"])

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Encode preprocessed patches.

        Args:
            x: (N, C, X, Y, Z) float as `prepare` makes it; sizes are multiples of `token_size`.

        Returns:
            four maps (N, D, X, Y, Z) at the cumulative strides of the stages; the last is the transformer's output.
        """
        return self.encoder.forward_features(x)

    def forward(self, x: Tensor) -> Tensor:
        """The last map of `forward_features`."""
        return self.forward_features(x)[-1]

    def prepare(self, image: str | Path | np.ndarray, spacing: Sequence[float] | None = None) -> np.ndarray:
        """Prepare an image as nnU-Net prepared those of the pretraining.

        Args:
            image: a NIfTI, NRRD or MHA file; or voxels (Z, Y, X) or (C, Z, Y, X), in HU for CT, in the orientation of
                the pretraining (mim_prepare turns images to RAS).
            spacing: mm between voxels along z, y, x; for an array only.

        Returns:
            (C, X, Y, Z) float32, normalised, at the spacing of the pretraining.

        Raises:
            MiMError: the image cannot be read or does not fit.
        """
        if isinstance(image, np.ndarray) == (spacing is None):
            raise MiMError("give spacing=(z, y, x) in mm with an array, and none with a file, which states its own")
        if isinstance(image, np.ndarray):
            assert spacing is not None
            raw = _raw_image(image, spacing)
        else:
            raw = self._read(Path(image))
        if len(raw.voxels) != self.in_channels:
            raise MiMError(f"{raw.name} has {len(raw.voxels)} channels, the encoder takes {self.in_channels}")
        return preprocess(raw, self.provenance)[0]

    def _read(self, path: Path) -> RawImage:
        reader = self.provenance.get("image_reader_writer") or READER
        check_name(f"{self.checkpoint}: image_reader_writer", "image reader", reader, "take another copy of it")
        outcome = read_voxels(path, reader)
        if isinstance(outcome, Failure):
            raise MiMError(f"cannot read {path} ({outcome.reason}): {GIVE}")
        voxels, spacing = outcome
        return _as_raw_image(path.name, voxels, spacing)

    def _save_pretrained(self, save_directory: Path) -> None:
        """For `save_pretrained` and `push_to_hub`: the files of `mim_export`, without names of cases."""
        stored = load_checkpoint(self.checkpoint)
        folder = Path(save_directory) / ".export"
        export(stored, model_card(Facts(stored, self.checkpoint), None, None), folder, with_names=False)
        for file in folder.iterdir():
            file.replace(Path(save_directory) / file.name)
        folder.rmdir()

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None = None, **_: Any) -> Encoder:
        """For `from_pretrained`: a folder, or a repository."""
        return cls(f"{model_id}@{revision}" if revision else model_id)


def load_encoder(checkpoint: str | Path) -> Encoder:
    """A pretrained encoder, on the CPU, in evaluation mode.

    Args:
        checkpoint: what `-pc` takes, such as a `checkpoint_final.pth` or `tiny-ct`, see docs/checkpoint.md.

    Raises:
        MiMError: missing, damaged, or not the hybrid encoder.
    """
    locate(checkpoint)
    return Encoder(checkpoint)


@torch.no_grad()
def features(
    encoder: Encoder, image: str | Path | np.ndarray, spacing: Sequence[float] | None = None,
    window: Sequence[int] = LARGEST_WINDOW,
) -> np.ndarray:  # fmt: skip
    """One vector for a whole image: mean and maximum of every map of the encoder, over all windows of the image.

    Args:
        encoder: on any device.
        image: as in `Encoder.prepare`.
        spacing: as in `Encoder.prepare`.
        window: maximum number of voxels per axis that are encoded at once.

    Returns:
        (F,) float32, F twice the sum of `encoder.dims`; per stage the means, then the maxima.

    Raises:
        MiMError: the image cannot be read or does not fit.
    """
    voxels = encoder.prepare(image, spacing)
    X, Y, Z = encoder.token_size
    case = CaseVoxels("image", voxels, None, encoder.spacing or (1.0, 1.0, 1.0), {})
    device = str(next(encoder.parameters()).device)
    pooled = pooled_maps(encoder, cut_regions(case, 0.0, window, (X, Y, Z)), device)
    return torch.cat([box.result().cpu() for box, _ in pooled]).numpy()


def _raw_image(voxels: np.ndarray, spacing: Sequence[float]) -> RawImage:
    if voxels.ndim not in (3, 4) or len(spacing) != 3 or min(spacing) <= 0:
        raise MiMError(f"voxels of shape {voxels.shape} with spacing {tuple(spacing)}: give (Z, Y, X) or (C, Z, Y, X)")
    if not np.isfinite(voxels).all():
        raise MiMError("the voxels hold NaN or infinity: correct them")
    return _as_raw_image("the array", voxels if voxels.ndim == 4 else voxels[None], spacing)


def _as_raw_image(name: str, voxels: np.ndarray, spacing: Sequence[float]) -> RawImage:
    """Voxels (C, Z, Y, X) whose place in the patient does not matter."""
    return RawImage(name, voxels.astype(np.float32), Grid(np.zeros(3), np.diag(np.asarray(spacing, float))))
