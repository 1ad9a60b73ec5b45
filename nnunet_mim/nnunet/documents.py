"""What this package needs of nnU-Net's JSON files, as schemas. Everything else in them is left as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from nnunet_mim.config import LARGEST_DEPTH, LARGEST_MLP_RATIO, LARGEST_STRIDE, LARGEST_WIDTH
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
FileName = Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$")]
"""of a file that the system is asked for"""
Labels = int | list[int]
"""of one label: its number, or the numbers of a region"""
Width = Annotated[int, Field(ge=1, le=LARGEST_WIDTH)]
Depth = Annotated[int, Field(ge=1, le=LARGEST_DEPTH)]
Stride = Annotated[list[Annotated[int, Field(ge=1, le=LARGEST_STRIDE)]], Field(min_length=2, max_length=3)]
Kernel = Annotated[list[Annotated[int, Field(ge=1, le=7)]], Field(min_length=2, max_length=3)]
Stages = Field(min_length=2, max_length=12)
FourStages = Field(min_length=4, max_length=4)
Options = dict[str, bool | int | float | str] | None

HYBRID_UNET = "nnunet_mim.networks.hybrid_unet.HybridUNet"
"""this package's network in plans; nnU-Net imports what plans name, so that no other module will do"""
PLAIN = "PlainConvUNet"
LARGEST_PATCH, LARGEST_PATCH_SIDE = 512**3, 4096
"""voxels of a patch in all, and along an axis"""
PER_AXIS = ("patch_size", "median_image_size_in_voxels", "spacing")

document = with_config(ConfigDict(strict=True, extra="allow"))


@document
class Architecture(TypedDict):
    """The block of plans that names a network."""

    network_class_name: str
    arch_kwargs: dict[str, Any]
    _kw_requires_import: list[str]


@document
class HybridArguments(TypedDict):
    """`arch_kwargs` of this package's network."""

    embed_dims: Annotated[list[Width], FourStages]
    depths: Annotated[list[Depth], FourStages]
    num_heads: Width
    mlp_ratio: Annotated[float, Field(gt=0, le=LARGEST_MLP_RATIO)]
    strides: Annotated[list[Annotated[Stride, Field(min_length=3)]], Field(min_length=5, max_length=12)]
    drop_path: NotRequired[Annotated[float, Field(ge=0, lt=1)]]
    stem_features: NotRequired[Width]
    decoder_features: NotRequired[Annotated[list[Width], FourStages] | None]
    n_conv_per_stage_decoder: NotRequired[Depth]


@document
class StockArguments(TypedDict):
    """`arch_kwargs` of nnU-Net's U-Nets; nnU-Net says what else is missing."""

    n_stages: int
    features_per_stage: Annotated[list[Width], Stages]
    conv_op: NotRequired[str]
    kernel_sizes: NotRequired[Annotated[list[Kernel], Stages]]
    strides: Annotated[list[Stride], Stages]
    n_conv_per_stage_decoder: NotRequired[Depth | Annotated[list[Depth], Field(max_length=12)]]
    conv_bias: NotRequired[bool]
    norm_op: NotRequired[str | None]
    norm_op_kwargs: NotRequired[Options]
    dropout_op: NotRequired[str | None]
    dropout_op_kwargs: NotRequired[Options]
    nonlin: NotRequired[str | None]
    nonlin_kwargs: NotRequired[Options]


@document
class PlainArguments(StockArguments):
    """`arch_kwargs` of PlainConvUNet."""

    n_conv_per_stage: NotRequired[Depth | Annotated[list[Depth], Stages]]


@document
class ResidualArguments(StockArguments):
    """`arch_kwargs` of ResidualEncoderUNet."""

    n_blocks_per_stage: NotRequired[Depth | Annotated[list[Depth], Stages]]


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

    images: Annotated[list[FileName], Field(min_length=1)]
    label: NotRequired[FileName]


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


@document
class Split(TypedDict):
    """An entry of splits_final.json."""

    train: list[CaseName]
    val: list[CaseName]


SPLITS = TypeAdapter(Annotated[list[Split], Field(min_length=1)])
ARCHITECTURE, CONFIGURATION = TypeAdapter(Architecture), TypeAdapter(CompleteConfiguration)
PLANS = TypeAdapter(Plans)
FINGERPRINT = TypeAdapter(Fingerprint)
DATASET_DESCRIPTION = TypeAdapter(DatasetDescription)
ARGUMENTS: dict[str, TypeAdapter] = {
    HYBRID_UNET: TypeAdapter(HybridArguments),
    PLAIN: TypeAdapter(PlainArguments),
    "ResidualEncoderUNet": TypeAdapter(ResidualArguments),
}
"""by network; nnU-Net's have had several modules"""


def read_plans(path: Path) -> dict[str, Any]:
    """The content of a plans file.

    Raises:
        MiMError: it cannot be read, a field is missing, of another kind or too large, axes are not a permutation, a
            channel that is normalised as CT has no window, or a name is none of nnU-Net's readers, preprocessors and
            so on.
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
        check_patch(f"{path}: patch_size of {name}", configuration.get("patch_size", []), "plan the dataset again")
        if "architecture" in configuration:
            place = f"{path}: configurations.{printable(name)}.architecture"
            check_architecture(place, configuration["architecture"], "plan the dataset again")  # type: ignore[arg-type]
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
    plain = json.loads(json.dumps(content))  # without tuples
    checked(place, plain, CONFIGURATION, "plan the dataset again")
    if "architecture" in plain:  # nnU-Net makes one of older plans
        check_architecture(f"{place}, architecture", plain["architecture"], "plan the dataset again")
    return content


def check_patch(place: str, patch_size: Sequence[int], remedy: str) -> None:
    """Raise MiMError for a patch, which `place` names, that is larger than LARGEST_PATCH or LARGEST_PATCH_SIDE."""
    if math.prod(patch_size) > LARGEST_PATCH or max(patch_size, default=1) > LARGEST_PATCH_SIDE:
        raise MiMError(
            f"{place} has {' x '.join(map(str, patch_size))} voxels (the plans' order of axes), and may have "
            f"{LARGEST_PATCH:,}, along an axis {LARGEST_PATCH_SIDE}: {remedy}"
        )


def check_architecture(place: str, architecture: Any, remedy: str, plain: bool = False) -> None:
    """Raise MiMError unless a block of plans names a network, with sizes that can be built if this package builds it.

    Args:
        place: the file and the name of the block in it, for the message.
        architecture: the block.
        remedy: for the message.
        plain: look at the sizes of nnU-Net's default network, PlainConvUNet, as well.
    """
    block = checked(place, architecture, ARCHITECTURE, remedy)
    name, kwargs = block["network_class_name"], block["arch_kwargs"]
    short = name if name == HYBRID_UNET else name.rpartition(".")[2]
    schema = ARGUMENTS.get(short)
    if schema is None or (short == PLAIN and not plain):
        return
    if name == HYBRID_UNET:
        checked(f"{place}.arch_kwargs", kwargs, schema, "write the plans again with mim_plan or mim_prepare")
        return
    checked(f"{place}.arch_kwargs", kwargs, schema, remedy)
    stages, axes = kwargs["n_stages"], 2 if kwargs.get("conv_op", "").endswith("2d") else 3
    lengths = dict.fromkeys(StockArguments.__annotations__, stages) | {"n_conv_per_stage_decoder": stages - 1}
    lengths |= {"n_conv_per_stage": stages, "n_blocks_per_stage": stages}
    for field, value in kwargs.items():
        if isinstance(value, list) and len(value) != lengths.get(field, len(value)):
            raise MiMError(f"{place}: {field} must have {lengths[field]} entries, of {stages} stages: {remedy}")
    if {len(entry) for field in ("kernel_sizes", "strides") for entry in kwargs.get(field, [])} != {axes}:
        raise MiMError(f"{place}: kernel_sizes and strides must have {axes} numbers each: {remedy}")


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


def read_splits(path: Path, remedy: str) -> list[Split]:
    """The content of splits_final.json, or of a file like it. Raises MiMError for one that nnU-Net would not write."""
    content: Any = read_json(path)
    checked(str(path), content, SPLITS, f'it is no list like [{{"train": ["a", "b"], "val": ["c"]}}, …]: {remedy}')
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
