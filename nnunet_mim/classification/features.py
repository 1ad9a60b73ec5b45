"""Features of the frozen encoder: per stage, mean and maximum over what is looked at of a case."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nnunet_mim.classification.encoders import LoadedEncoder
from nnunet_mim.classification.network import place_weights
from nnunet_mim.classification.options import ClassifyConfig
from nnunet_mim.classification.regions import CaseReader, CaseVoxels, Region, cut_regions
from nnunet_mim.nnunet.plans import voxels_key
from nnunet_mim.nnunet.source import Source
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.progress import ProgressBar

FEATURES_VERSION = 1
CACHE_FOLDER = "mim_classify_features"


class Pooling:
    """Mean and maximum of maps over the places that count, over all windows of a case."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.weight = 0.0
        self.maximum: Tensor | None = None

    def add(self, features: Tensor, counts: Tensor) -> None:
        """Add a window: a map (D, gx, gy, gz), and the places (X, Y, Z) bool of its image that count."""
        weights = place_weights(counts[None], features.shape[1:])[0]
        if not weights.any():
            return
        self.total = self.total + (features * weights).sum(dim=(1, 2, 3))
        self.weight += float(weights.sum())
        # at the rim of a box only places that lie in it by half, if there are any
        inside = weights >= min(0.5, float(weights.max()))
        maximum = features[:, inside].amax(dim=1)
        self.maximum = maximum if self.maximum is None else torch.maximum(self.maximum, maximum)

    def result(self) -> Tensor:
        """(2 D,) mean, then maximum."""
        assert self.maximum is not None
        return torch.cat([torch.as_tensor(self.total) / self.weight, self.maximum])


@dataclass(frozen=True)
class FeatureExtractor:
    """Computes the features of cases with a frozen encoder."""

    encoder: LoadedEncoder
    config: ClassifyConfig
    device: str = "cpu"

    def of_case(self, case: CaseVoxels) -> np.ndarray:
        """(F,) float32: per stage mean and maximum over the box, and over the mask where one is given."""
        regions = cut_regions(case, self.config.margin, self.config.window, self.encoder.cell)
        pooled = pooled_maps(self.encoder.module.to(self.device), regions, self.device)
        parts = [part for box, mask in pooled for part in ((box, mask) if self.config.roi else (box,))]
        return torch.cat([part.result().cpu() for part in parts]).numpy()

    def of_cases(self, reader: CaseReader, cases: Sequence[str]) -> np.ndarray:
        """(N, F) float32 features of preprocessed cases; those that were computed before are read from a cache.

        Raises MiMError for a case that cannot be read.
        """
        cache = FeatureCache(reader, self._key(reader.source))
        known = cache.load()
        missing = [case for case in cases if case not in known]
        for case in ProgressBar(missing, desc="features", unit="case"):
            known[case] = self.of_case(reader.read(case))
        if missing:
            cache.save(known)
        return np.stack([known[case] for case in cases])

    def _key(self, source: Source) -> str:
        """Hash of everything that decides features of the same files."""
        config = self.config
        roi = str(Path(config.roi).resolve()) if Path(config.roi).is_dir() else config.roi
        content = [
            FEATURES_VERSION, self.encoder.sha256, voxels_key(source.plans, source.configuration), roi, config.margin,
            list(config.window),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


@torch.no_grad()
def pooled_maps(encoder: torch.nn.Module, regions: Sequence[Region], device: str) -> list[tuple[Pooling, Pooling]]:
    """Per stage of an encoder: its maps pooled over the box and over the mask, over all windows of a case."""
    pooled: list[tuple[Pooling, Pooling]] = []
    for region in regions:
        image = torch.from_numpy(region.voxels)[None].to(device)
        counts, mask = (torch.from_numpy(places).to(device) for places in (region.counts, region.mask))
        for stage, features in enumerate(encoder.forward_features(image)):  # type: ignore[operator]
            if stage == len(pooled):
                pooled.append((Pooling(), Pooling()))
            pooled[stage][0].add(features[0], counts)
            pooled[stage][1].add(features[0], mask)
    return pooled


class FeatureCache:
    """Features of cases by name, in a file beside the preprocessed cases; cases whose files have changed are dropped.

    Args:
        reader: of the cases.
        key: of everything else that decides the features.
    """

    def __init__(self, reader: CaseReader, key: str) -> None:
        self.reader = reader
        self.path = reader.source.folder.parent / CACHE_FOLDER / f"{reader.source.folder.name}_{key}.npz"

    def load(self) -> dict[str, np.ndarray]:
        """Features of unchanged cases; empty where there is no cache."""
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                names, stamps, values = (stored[name] for name in ("names", "stamps", "values"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return {}
        rows = zip(names.tolist(), stamps.tolist(), values, strict=True)
        return {name: value for name, stamp, value in rows if stamp == self._stamp(name)}

    def save(self, features: dict[str, np.ndarray]) -> None:
        """Write all features; where that is impossible they are computed anew next time."""
        names = sorted(features)
        content = io.BytesIO()
        np.savez(
            content,
            names=np.array(names, np.str_),
            stamps=np.array([self._stamp(name) for name in names], np.int64),
            values=np.stack([features[name] for name in names]),
        )
        try:
            self.path.parent.mkdir(exist_ok=True)
            write_atomically(self.path, content.getvalue())
        except OSError as error:
            print(f"note: features could not be cached in {self.path.parent} ({error.strerror}): made anew next time")

    def _stamp(self, case: str) -> list[int]:
        """Size (bytes) and time (ns) of each file of a case; -1 where there is none."""

        def numbers() -> Iterator[int]:
            for path in self.reader.stamp_files(case):
                try:
                    status = path.stat()
                except OSError:
                    yield from (-1, -1)
                else:
                    yield from (status.st_size, status.st_mtime_ns)

        return list(numbers())
