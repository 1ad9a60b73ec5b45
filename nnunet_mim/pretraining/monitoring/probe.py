"""Label probe: how well frozen features predict labels, to rank checkpoints without finetuning.

A closed-form ridge regression from the encoder's maps, interpolated to voxels, to the labels of a few cases gives every
voxel of a few held-out cases a score for each label. The figure of a label is the Dice of the threshold that is best
for them: a threshold found on so few other cases adds more noise than encoders differ by, and finetuning finds its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from scipy.ndimage import maximum_filter
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from nnunet_mim.config import Size3
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.build import FeatureSource
from nnunet_mim.nnunet.documents import Labels, checked, document
from nnunet_mim.pretraining.data.crops import Case, Cases, read_crop
from nnunet_mim.pretraining.monitoring.figures import ProbeFigures
from nnunet_mim.system.untrusted import read_json

RIDGE = 1e-3
"""penalty on the coefficients of standardised features; the weights of all voxels sum to 1"""
MAX_LABELS = 16
"""of more labels, those in the largest number of boxes are probed"""
MAX_PER_LABEL, MAX_NEAR, MAX_BACKGROUND = 1000, 2000, 4000
"""voxels of a training box that are regressed on: of each label, of background near labels, of all background"""
NEAR_DISTANCE = 3
"""voxels along an axis"""
IGNORED = -1
"""stands for nnU-Net's ignore label"""
MAX_TRIES = 4
"""number of cases that are searched for labels for each that is needed"""


@dataclass(frozen=True)
class _LabelledBox:
    """A box of a case around its labels."""

    image: Tensor
    """(C, X, Y, Z) float32, normalised"""
    labels: Tensor
    """(X, Y, Z) int64; 0 background, IGNORED where nothing is known"""


class LabelProbe:
    """Reads its boxes once; `evaluate` measures an encoder on them.

    Args:
        train, held_out: labelled cases of one dataset, see `probe_cases`.
        fill: per channel, the window's minimum, which boxes are padded with to whole tokens.
        box_size: maximum number of voxels per axis.
        seed: of the boxes' places and the voxels that are regressed on.
        device: of the encoders.

    Raises:
        MiMError: a case cannot be read.
    """

    def __init__(
        self, train: list[Case], held_out: list[Case], fill: tuple[float, ...], box_size: Size3 = (128, 128, 128),
        seed: int = 0, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        self.fill = torch.tensor(fill, device=self.device)
        self.train = [_read_box(case, box_size, seed) for case in train]
        self.held_out = [_read_box(case, box_size, seed) for case in held_out]
        self.labels = _common_labels(self.train, self.held_out)
        self.voxels = [_sample_voxels(box.labels, self.labels, seed) for box in self.train]

    @torch.no_grad()
    def evaluate(self, encoder: FeatureSource) -> ProbeFigures[float]:
        """Dice of each label at the best threshold over the voxels of all held-out boxes, and their mean; empty where
        no label is in boxes of both sides. The encoder's mode, training or not, stays.

        Raises:
            MiMError: the features are not finite.
        """
        was_training = encoder.training
        encoder.eval()
        try:
            coefficients = self._fit(encoder)
            scores = [self._scores(encoder, box.image, coefficients) for box in self.held_out]
        finally:
            encoder.train(was_training)
        labels = torch.cat([box.labels.flatten() for box in self.held_out]).to(self.device)
        is_labelled = labels != IGNORED
        dice = {}
        for number, label in enumerate(self.labels):  # one at a time: scores of whole boxes are large
            dense = [
                _voxel_scores([m[number] for m in maps], encoder.token_size, box.labels.shape).flatten()
                for maps, box in zip(scores, self.held_out, strict=True)
            ]
            dice[label] = _best_dice(torch.cat(dense)[is_labelled], labels[is_labelled] == label)
        return ProbeFigures(sum(dice.values()) / len(dice) if dice else None, dice)

    def _fit(self, encoder: FeatureSource) -> Tensor:
        """(F, labels) coefficients for the channels of all maps, one map after the other."""
        features, labels = [], []
        for box, voxels in zip(self.train, self.voxels, strict=True):
            image = self._padded(encoder, box.image)
            features.append(_features_at(_feature_maps(encoder, image), voxels.to(self.device), image.shape[2:]).cpu())
            labels.append(box.labels[tuple(voxels.T)])
        is_class = torch.cat(labels)[:, None] == torch.tensor([0, *self.labels])
        weights = (is_class / is_class.sum(dim=0).clamp(min=1)).sum(dim=1)  # background and every label weigh the same
        coefficients = _ridge(torch.cat(features), is_class[:, 1:], weights, RIDGE)
        if not torch.isfinite(coefficients).all():
            raise MiMError("label probe: the encoder's features are not finite")
        return coefficients.float().to(self.device)

    def _scores(self, encoder: FeatureSource, image: Tensor, coefficients: Tensor) -> list[Tensor]:
        """The maps' summands of the scores, (labels, …) on each map's own grid."""
        maps = _feature_maps(encoder, self._padded(encoder, image))
        parts = coefficients.split([m.shape[0] for m in maps])
        with torch.autocast(self.device.type, enabled=False):
            return [torch.einsum("cxyz,ck->kxyz", m, part) for m, part in zip(maps, parts, strict=True)]

    def _padded(self, encoder: FeatureSource, image: Tensor) -> Tensor:
        """(1, C, …) on the device, padded at the far ends to whole tokens."""
        size = [-(-n // p) * p for n, p in zip(image.shape[1:], encoder.token_size, strict=True)]
        padded = self.fill[:, None, None, None].repeat(1, *size)
        x, y, z = image.shape[1:]
        padded[:, :x, :y, :z] = image.to(self.device)
        return padded[None]


def probe_cases(
    train: Cases, held_out: Cases, counts: Sequence[int] = (6, 4), seed: int = 0
) -> tuple[list[Case], list[Case]] | None:
    """Choose at random labelled cases to fit on and to test on, at most `counts`; None where there are no labels.

    All are of one dataset, the first with labelled cases on both sides: another's labels mean something else.
    """
    for dataset in range(len(train.sources)):
        chosen = []
        for cases, count in zip((train, held_out), counts, strict=True):
            candidates = cases.of_dataset(dataset)
            order = np.random.default_rng(seed).permutation(len(candidates))[: MAX_TRIES * count]
            chosen.append(list(islice(filter(_has_labels, (candidates[int(n)] for n in order)), count)))
        if all(chosen):
            return chosen[0], chosen[1]
    return None


@document
class _Labelled(TypedDict):
    """What is needed of dataset.json here."""

    labels: NotRequired[dict[str, Labels]]


LABELLED = TypeAdapter(_Labelled)


def _has_labels(case: Case) -> bool:
    """Whether a voxel of a case has a label other than background."""
    labels = _read_labels(case)
    return labels is not None and bool((labels > 0).any())


def _read_labels(case: Case) -> np.ndarray | None:
    """(X, Y, Z) int16 labels of a case as in _LabelledBox; None where no segmentation can be read."""
    source, name = case.source, case.info.case
    try:
        segmentation = source.dataset_class(str(source.folder), [name]).load_case(name)[1]
        labels = np.asarray(segmentation[0], dtype=np.int16)
    except Exception:  # as good as unlabelled: pretraining needs no labels
        return None
    file = source.folder.parent / "dataset.json"
    content = checked(str(file), read_json(file), LABELLED, "restore it") if file.is_file() else {}
    ignore = content.get("labels", {}).get("ignore")
    return np.where(labels == ignore, IGNORED, labels.clip(min=0)).astype(np.int16)


def _read_box(case: Case, max_size: Size3, seed: int) -> _LabelledBox:
    """Read a box inside the volume with all labels or, where they spread wider, some of them. Its place is random:
    where in a box an organ lies must say nothing.
    """
    labels = _read_labels(case)
    if labels is None or not (labels > 0).any():
        raise MiMError(f"case '{case.info.case}' of {case.source.dataset} has no labels for the label probe")
    size = np.minimum(max_size, labels.shape)
    start = _box_start(labels > 0, size, np.random.default_rng([seed, int(case.info.sha256[:8], 16)]))
    image, _ = read_crop(case, start, size)
    inside = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    return _LabelledBox(torch.from_numpy(image), torch.from_numpy(labels[inside].astype(np.int64)))


def _box_start(foreground: np.ndarray, size: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(3,) first voxel of a box with all foreground along the axes where it fits, and at least one voxel of it."""
    voxel = np.unravel_index(random.choice(np.flatnonzero(foreground)), foreground.shape)
    start = []
    for axis, n in enumerate(size):
        along = np.flatnonzero(foreground.any(axis=tuple({0, 1, 2} - {axis})))
        first, end = along[0], along[-1] + 1
        if end - first <= n:
            low, high = max(end - n, 0), min(first, foreground.shape[axis] - n)
        else:
            low, high = max(first, voxel[axis] - n + 1), min(end - n, voxel[axis])
        start.append(random.integers(low, high + 1))
    return np.array(start)


def _common_labels(train: Sequence[_LabelledBox], held_out: Sequence[_LabelledBox]) -> list[int]:
    """Labels in boxes of both sides, ascending; at most MAX_LABELS, those in the largest number of training boxes."""
    counts = Counter(label for box in train for label in box.labels.unique().tolist() if label > 0)
    tried = {label for box in held_out for label in box.labels.unique().tolist()}
    return sorted(sorted(counts.keys() & tried, key=lambda label: (-counts[label], label))[:MAX_LABELS])


def _sample_voxels(labels: Tensor, wanted: Sequence[int], seed: int) -> Tensor:
    """(S, 3) voxels of a box to regress on: of each wanted label, near labels, and anywhere in the background."""
    random = np.random.default_rng(seed)
    volume = labels.numpy()
    background = volume == 0
    near = background & maximum_filter(volume > 0, size=2 * NEAR_DISTANCE + 1)
    pools = [(volume == label, MAX_PER_LABEL) for label in wanted]
    pools += [(near, MAX_NEAR), (background, MAX_BACKGROUND)]
    chosen = [random.permutation(np.flatnonzero(pool))[:count] for pool, count in pools]
    return torch.from_numpy(np.stack(np.unravel_index(np.concatenate(chosen), volume.shape), axis=-1))


def _feature_maps(encoder: FeatureSource, image: Tensor) -> list[Tensor]:
    """The encoder's maps (C, …) of one image (1, C, …), in float32, each followed by its means over 3 x 3 x 3 places,
    continued at the edges: a linear regression cannot look around by itself.
    """
    maps = []
    for m in encoder.forward_features(image):
        near = F.avg_pool3d(F.pad(m.float(), (1,) * 6, mode="replicate"), 3, stride=1)
        maps += [m[0].float(), near[0]]
    return maps


def _features_at(maps: Sequence[Tensor], voxels: Tensor, size: Sequence[int]) -> Tensor:
    """(S, F) all maps' channels at voxels (S, 3) of an image of `size`, interpolated (trilinear)."""
    grid = ((2 * voxels + 1) / torch.tensor(size, device=voxels.device) - 1).flip(-1)[None, None, None]
    at = [F.grid_sample(m[None], grid, padding_mode="border", align_corners=False)[0, :, 0, 0] for m in maps]
    return torch.cat(at).T


def _voxel_scores(maps: Sequence[Tensor], token_size: Size3, shape: Sequence[int]) -> Tensor:
    """Sum of maps, each a 3-D array, interpolated to the voxels of their image and cropped to `shape`.

    Interpolating and a linear map of the channels may be swapped: `features_at` times the coefficients is the same.
    """
    size = [n * p for n, p in zip(maps[-1].shape, token_size, strict=True)]
    total = sum(F.interpolate(m[None, None], size, mode="trilinear", align_corners=False)[0, 0] for m in maps)
    return total[tuple(map(slice, shape))]  # type: ignore[index]


def _ridge(features: Tensor, targets: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Coefficients b of the closed form of min Σ w (t − x·b − c)² / Σ w + strength · Σ (σ b)²: (F, K) float64.

    Features x (S, F) are standardised with their mean and deviation σ under the weights w (S,); t are targets (S, K).
    The intercept c is free and left out. A feature that does not vary gets 0.
    """
    share = (weights.double() / weights.double().sum())[:, None]
    x, y = features.double(), targets.double()
    x = x - (share * x).sum(dim=0)
    y = y - (share * y).sum(dim=0)
    deviation = (share * x.square()).sum(dim=0).sqrt().clamp(min=1e-6)
    x /= deviation
    penalty = strength * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    solution = torch.linalg.solve(x.T @ (share * x) + penalty, x.T @ (share * y))
    return solution / deviation[:, None]


def _best_dice(scores: Tensor, is_label: Tensor) -> float:
    """Largest Dice of {scores ≥ t} and the label over all t, both (V,); exact above 0.02, an upper bound below."""
    inside = scores[is_label].sort(descending=True).values
    outside = scores[~is_label]
    outside = outside.topk(min(len(outside), 100 * len(inside))).values  # with more false voxels Dice is below 0.02
    true = torch.arange(1, len(inside) + 1, device=scores.device)
    false = torch.searchsorted(-outside, -inside, right=True)
    return float((2 * true / (true + false + len(inside))).max()) if len(inside) else 0.0
