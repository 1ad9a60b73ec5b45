"""Which preprocessed cases a run reads, and in which units they are: nnU-Net's folders, plans and splits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.cases import dataset_class_of
from nnunet_mim.nnunet.datasets import dataset_name
from nnunet_mim.nnunet.documents import read_plans
from nnunet_mim.nnunet.intensities import Intensities
from nnunet_mim.nnunet.plans import (
    configuration_of,
    mim_prepare_command,
    preprocess_command,
    preset_option,
    require_preprocessed,
    zyx_of,
)
from nnunet_mim.system.untrusted import read_json

GONE = (-1, -1)
"""in place of size and time of a file"""


@dataclass(frozen=True)
class Source:
    """One preprocessed nnU-Net dataset in one configuration of its plans."""

    dataset: str
    """DatasetXXX_Name"""
    plans_name: str
    configuration: str
    folder: Path
    """of the preprocessed cases"""
    dataset_class: Any
    """reader of that folder, see `dataset_class_of`"""
    cases: tuple[str, ...]
    """sorted identifiers"""
    spacing: tuple[float, ...]
    """mm per voxel, array order"""
    normalization: tuple[str, ...]
    """nnU-Net's scheme per channel"""
    intensity_properties: dict[str, dict[str, float]]
    """per channel, from the plans: the window and scale that CTNormalization uses, HU"""
    plans: dict[str, Any]

    @property
    def in_channels(self) -> int:
        return len(self.normalization)

    @property
    def spacing_zyx(self) -> tuple[float, ...]:
        """mm per voxel in the order (z, y, x) of the images, which the plans may have changed."""
        return zyx_of(self.spacing, self.plans)

    @property
    def preprocess_command(self) -> str:
        """The command that preprocesses its cases once more."""
        return preprocess_command(self.folder, self.plans, self.plans_name, self.configuration)

    @property
    def plans_file(self) -> Path:
        """The file of its plans."""
        return self.folder.parent / f"{self.plans_name}.json"

    @property
    def index_file(self) -> Path:
        """Where the case index is cached: beside, never inside, the folder of cases (nnU-Net reads all files there)."""
        return self.folder.parent / "mim_case_index" / f"{self.folder.name}.npz"

    def case_file(self, case: str) -> Path:
        """The file that holds the voxels of a case."""
        for ending in (".b2nd", ".npy", ".npz"):
            if (path := self.folder / f"{case}{ending}").is_file():
                return path
        return self.folder / f"{case}.b2nd"

    def file_stamp(self, case: str) -> tuple[int, int]:
        """Size (bytes) and modification time (ns) of the file that holds a case's voxels; GONE where there is none."""
        try:
            status = os.stat(self.case_file(case))
        except OSError:
            return GONE  # reading it will say why
        return status.st_size, status.st_mtime_ns

    @property
    def intensities(self) -> Intensities:
        """How the channels were normalised."""
        return Intensities(self.normalization, self.intensity_properties)


def plans_in(base: Path) -> list[str]:
    """Names of all plans in a dataset's folder in nnUNet_preprocessed."""
    contents = {path.stem: read_json(path) for path in sorted(base.glob("*.json"))}
    return [name for name, content in contents.items() if isinstance(content, dict) and "configurations" in content]


def find_source(dataset: str, plans_name: str, configuration: str, settings: tuple[str, str] = ("-p", "-c")) -> Source:
    """Find a preprocessed dataset by its number (`501`) or name (`Dataset501_Name`).

    `settings` are what the user names plans and configuration with, for messages.

    Raises MiMError for an unknown dataset, plans or configuration, a 2-D one, and where nothing is preprocessed.
    """
    name = dataset_name(dataset)
    base = Path(str(nnUNet_preprocessed), name)
    plans_file = base / f"{plans_name}.json"
    if not base.is_dir():
        command = f"nnUNetv2_plan_and_preprocess -d {name[7:10]}"
        raise MiMError(f"{name} is not preprocessed ({base} does not exist): run {command}")
    if not plans_file.is_file():
        found = ", ".join(plans_in(base)) or "none found"
        raise MiMError(f"no plans '{plans_name}' for {name}: choose one with {settings[0]} ({found})")
    plans = read_plans(plans_file)
    if configuration not in plans["configurations"]:
        available = ", ".join(plans["configurations"])
        raise MiMError(
            f"{plans_file} has no configuration '{configuration}': choose one with {settings[1]} ({available})"
        )
    content = configuration_of(plans, configuration)
    folder = base / content["data_identifier"]
    require_preprocessed(folder, plans, plans_name, configuration)
    command = preprocess_command(folder, plans, plans_name, configuration)
    try:
        dataset_class = dataset_class_of(folder)
    except (AssertionError, RuntimeError) as error:
        raise MiMError(f"{folder} does not look like nnU-Net's preprocessed cases ({error}): run {command}") from error
    cases = tuple(sorted(dataset_class.get_identifiers(str(folder))))
    if not cases:
        raise MiMError(f"no preprocessed case in {folder}: run {command}")
    return Source(
        name, plans_name, configuration, folder, dataset_class, cases,
        tuple(float(s) for s in content["spacing"]), tuple(content["normalization_schemes"]),
        plans["foreground_intensity_properties_per_channel"], plans,
    )  # fmt: skip


def prepare_command(sources: Sequence[Source], share: float = 1.0) -> str:
    """The command that prepares datasets anew with the first one's spacing, or with a share of it on every axis."""
    numbers = " ".join(source.dataset[7:10] for source in sources)
    first = sources[0]
    spacing = [round(share * mm, 4) for mm in first.spacing_zyx]
    preset = preset_option(first.plans["configurations"][first.configuration])
    return mim_prepare_command(numbers, spacing, "NAME", preset)


def require_same_units(sources: Sequence[Source]) -> None:
    """Raise MiMError unless all datasets have the first one's spacing, axes, normalisation and intensity windows."""
    first = sources[0]
    for other in sources[1:]:
        same_spacing = all(abs(a - b) <= 1e-3 * a for a, b in zip(first.spacing, other.spacing, strict=True))
        same_window = first.normalization == other.normalization and all(
            first.intensities.normalized_window(channel) == other.intensities.normalized_window(channel)
            for channel in range(first.in_channels)
        )
        same_axes = first.plans.get("transpose_forward") == other.plans.get("transpose_forward")
        if not (same_spacing and same_window and same_axes):
            raise MiMError(
                f"{other.dataset} has another spacing ({_mm(other)}), order of axes, normalisation or intensity window "
                f"than {first.dataset} ({_mm(first)}): prepare all alike with {prepare_command(sources)}, then "
                "pretrain with -p NAME"
            )


def _mm(source: Source) -> str:
    return f"{' x '.join(f'{s:g}' for s in source.spacing_zyx)} mm, z y x"


def orientation_warning(sources: Sequence[Source]) -> str | None:
    """What is wrong where some datasets were turned to one orientation by nnU-Net's reader and others were not."""
    turned = {s.dataset: "Reorient" in s.plans.get("image_reader_writer", "") for s in sources}
    if len(set(turned.values())) < 2:
        return None
    left = ", ".join(name for name, is_turned in turned.items() if not is_turned)
    return (
        f"{left}: images keep the orientation of their files, other datasets were turned to RAS; left and right may "
        "be exchanged between them. mim_prepare turns all of them"
    )


def window_warning(source: Source) -> str | None:
    """What a narrow CT window cuts off, or None for a window of at least -1000 to 900 HU."""
    window = source.intensities.hounsfield_window()
    if window is None or (window[0] <= -1000 and window[1] >= 900):
        return None
    tissues = {"lung": -800, "fat": -100, "contrast and soft tissue": 200, "bone": 900}
    lost = [tissue for tissue, hu in tissues.items() if not window[0] <= hu <= window[1]]
    return (
        f"the plans '{source.plans_name}' clip CT to {window[0]:g} … {window[1]:g} HU: "
        f"{', '.join(lost) or 'some tissue'} cannot be told apart in pretraining. mim_plan -d {source.dataset} -p "
        f"{source.plans_name} -c {source.configuration} -o NAME writes plans with a wide window"
    )
