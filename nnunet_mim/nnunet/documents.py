"""What this package needs of nnU-Net's JSON files, as schemas. Everything else in them is left as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from nnunet_mim.errors import MiMError, printable
from nnunet_mim.nnunet.components import check_name, check_names
from nnunet_mim.nnunet.intensities import CT_NORMALIZATION, WINDOW_FIELDS
from nnunet_mim.system.untrusted import read_json

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Axes = Annotated[list[Annotated[int, Field(ge=0, le=2)]], Field(min_length=3, max_length=3)]
Name = Annotated[str, Field(pattern=r"^\w[\w .+-]*$")]
"""a part of a path, without separators"""
CaseName = Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]+$")]
"""what files are named after: without separators, which would lead to other folders"""
Labels = int | list[int]
"""of one label: its number, or the numbers of a region"""

PER_AXIS = ("patch_size", "median_image_size_in_voxels", "spacing")

document = with_config(ConfigDict(strict=True, extra="allow"))


@document
class Architecture(TypedDict):
    """The block of plans that names a network."""

    network_class_name: str
    arch_kwargs: dict[str, Any]
    _kw_requires_import: list[str]


@document
class Configuration(TypedDict):
    """A configuration of plans; what is missing may be inherited."""

    inherits_from: NotRequired[str]
    data_identifier: NotRequired[Name]
    previous_stage: NotRequired[str | None]
    batch_size: NotRequired[Count]
    patch_size: NotRequired[Annotated[list[Count], Field(min_length=2, max_length=3)]]
    median_image_size_in_voxels: NotRequired[Annotated[list[Positive], Field(min_length=2, max_length=3)]]
    spacing: NotRequired[Annotated[list[Positive], Field(min_length=2, max_length=3)]]
    normalization_schemes: NotRequired[Annotated[list[str], Field(min_length=1)]]
    use_mask_for_norm: NotRequired[list[bool]]
    preprocessor_name: NotRequired[str]
    resampling_fn_data: NotRequired[str]
    resampling_fn_seg: NotRequired[str]
    resampling_fn_probabilities: NotRequired[str]
    architecture: NotRequired[Architecture]


@document
class CompleteConfiguration(TypedDict):
    """A 3-D configuration with what it inherits."""

    data_identifier: Name
    batch_size: Count
    patch_size: Annotated[list[Count], Field(min_length=3, max_length=3)]
    spacing: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    median_image_size_in_voxels: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    normalization_schemes: Annotated[list[str], Field(min_length=1)]


@document
class Plans(TypedDict):
    """A plans file."""

    dataset_name: Name
    plans_name: Name
    transpose_forward: Axes
    transpose_backward: Axes
    image_reader_writer: NotRequired[str]
    label_manager: NotRequired[str]
    configurations: Annotated[dict[str, Configuration], Field(min_length=1)]
    foreground_intensity_properties_per_channel: dict[str, dict[str, float]]
    pretrain_info: NotRequired[dict[str, Any] | None]


@document
class Fingerprint(TypedDict):
    """dataset_fingerprint.json; sizes in voxels and spacings in mm, one triple per case, array order."""

    spacings: Annotated[list[Annotated[list[Positive], Field(min_length=3, max_length=3)]], Field(min_length=1)]
    shapes_after_crop: Annotated[list[Annotated[list[Count], Field(min_length=3, max_length=3)]], Field(min_length=1)]


@document
class Case(TypedDict):
    """An entry of `dataset` in dataset.json, where images and label are listed instead of found by their names."""

    images: Annotated[list[str], Field(min_length=1)]
    label: NotRequired[str]


@document
class DatasetDescription(TypedDict):
    """dataset.json; `modality` is the old name of `channel_names`."""

    channel_names: NotRequired[Annotated[dict[str, str], Field(min_length=1)]]
    modality: NotRequired[dict[str, str]]
    labels: dict[str, Labels]
    file_ending: Annotated[str, Field(pattern=r"^\.\w[\w.]*$")]
    numTraining: NotRequired[Count]
    dataset: NotRequired[dict[CaseName, Case]]
    regions_class_order: NotRequired[list[int]]
    overwrite_image_reader_writer: NotRequired[str]


CONFIGURATION = TypeAdapter(CompleteConfiguration)
PLANS = TypeAdapter(Plans)
FINGERPRINT = TypeAdapter(Fingerprint)
DATASET_DESCRIPTION = TypeAdapter(DatasetDescription)


def read_plans(path: Path) -> dict[str, Any]:
    """The content of a plans file.

    Raises:
        MiMError: it cannot be read, a field is missing or of another kind, axes are not a permutation, a channel
            that is normalised as CT has no window, or a name is none of nnU-Net's readers, preprocessors and so on.
    """
    return check_plans(read_json(path), str(path))


def check_plans(content: Any, path: str) -> dict[str, Any]:
    """Plans that were read already, once they have passed the checks of `read_plans`; `path` is named in errors."""
    plans = checked(path, content, PLANS, "restore the file, or plan the dataset again")
    if sorted(plans["transpose_forward"]) != [0, 1, 2] or sorted(plans["transpose_backward"]) != [0, 1, 2]:
        raise MiMError(f"{path}: transpose_forward and transpose_backward must hold 0, 1 and 2: plan the dataset again")
    check_names(path, plans, "plan the dataset again")
    windows = plans["foreground_intensity_properties_per_channel"]
    for name, configuration in plans["configurations"].items():
        sizes = {key: len(configuration[key]) for key in PER_AXIS if key in configuration}  # type: ignore[literal-required]
        if sizes.get("patch_size", 3) == 3 and set(sizes.values()) - {3}:
            raise MiMError(f"{path}: {', '.join(sizes)} of {name} must be as long as there are axes: plan again")
        for channel, scheme in enumerate(configuration.get("normalization_schemes", ())):
            window = windows.get(str(channel), {})
            if scheme == CT_NORMALIZATION and not is_window(window):
                raise MiMError(
                    f"{path}: channel {channel} of {name} is CT, and foreground_intensity_properties_per_channel holds "
                    f"no usable {', '.join(WINDOW_FIELDS)} for it: plan the dataset again"
                )
    return plans


def complete_configuration(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """A configuration of plans that have passed `check_plans`, with what it inherits filled in, as a copy.

    Raises:
        MiMError: it inherits from what does not exist or from itself, or something is missing.
    """
    try:
        content = PlansManager(deepcopy(plans)).get_configuration(configuration).configuration
    except (AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise MiMError(
            f"nnU-Net cannot read configuration {configuration} of plans {plans['plans_name']} "
            f"({type(error).__name__}: {error}): plan the dataset again"
        ) from error
    place = f"plans {plans['plans_name']}, configuration {configuration}"
    if len(content.get("patch_size", ())) == 2:
        return content
    checked(place, json.loads(json.dumps(content)), CONFIGURATION, "plan the dataset again")  # without tuples
    return content


def read_fingerprint(path: Path) -> dict[str, Any]:
    """The content of dataset_fingerprint.json. Raises MiMError for one that cannot be used."""
    remedy = "delete it and run nnUNetv2_extract_fingerprint -d DATASET"
    return checked(str(path), read_json(path), FINGERPRINT, remedy)


def read_dataset_json(path: Path) -> dict[str, Any]:
    """The content of dataset.json. Raises MiMError for one that cannot be used, or is of nnU-Net's first version."""
    content = read_json(path)
    if isinstance(content, dict) and "training" in content and "file_ending" not in content:
        raise MiMError(f"{path} is of nnU-Net v1: convert the dataset, nnUNetv2_convert_old_nnUNet_dataset FOLDER NAME")
    remedy = "see nnU-Net's page on its dataset format"
    checked(str(path), content, DATASET_DESCRIPTION, remedy)
    if "channel_names" not in content and "modality" not in content:
        raise MiMError(f"{path} has no channel_names: {remedy}")
    reader = content.get("overwrite_image_reader_writer", "None")
    if reader != "None":  # nnU-Net's word for none
        check_name(f"{path}: overwrite_image_reader_writer", "image reader", reader, "name one, or leave it out")
    return content


def checked(path: str, content: Any, schema: TypeAdapter, remedy: str) -> dict[str, Any]:
    """The content of a file as it was read, once it fits a schema. Raises MiMError that names the first wrong field."""
    try:
        schema.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = printable(".".join(map(str, first["loc"])) or "the content")
        if first["type"] == "missing":
            raise MiMError(f"{path} has no {field}: {remedy}") from None
        message = first["msg"][0].lower() + first["msg"][1:]
        raise MiMError(f"{path}: {field}: {message} (got {printable(repr(first['input']), 60)}): {remedy}") from None
    return content


def is_window(window: Mapping[str, float | None]) -> bool:
    """Whether the intensity properties of a channel are a window that CTNormalization can use."""
    low, high, mean, std = (math.nan if (value := window.get(name)) is None else value for name in WINDOW_FIELDS)
    return low < high and std > 0 and all(map(math.isfinite, (low, high, mean, std, high - low)))
