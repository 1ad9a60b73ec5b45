"""What a checkpoint says about itself, as schemas: the kinds of everything that its readers use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import Axes, Positive, checked, document, is_window
from nnunet_mim.nnunet.intensities import CT_NORMALIZATION, WINDOW_FIELDS

Number = Annotated[int, Field(ge=0)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{0,64}$")]
Fold = Number | Annotated[str, Field(pattern=r"^(all|[0-9]{1,9})$")]
REMEDY = "take another copy, or a checkpoint of this version of nnunet_mim"
NEEDED = ("datasets", "plans_name", "configuration", "fold", "spacing", "normalization", "intensity_properties",
          "iterations", "loss_history", "cases")  # fmt: skip
"""keys of provenance that a description needs; checkpoints to finetune from may lack any"""


@document
class Record(TypedDict):
    """A case that was trained on."""

    dataset: str
    case: str
    sha256: Hash
    image_sha256: NotRequired[Hash]
    fingerprint: NotRequired[Annotated[str, Field(pattern=r"^[0-9A-Za-z+/]*=*$")]]


@document
class SkippedStep(TypedDict):
    """A step whose gradient was not finite, and what it was computed from."""

    iteration: Number
    cases: list[str]


@document
class Provenance(TypedDict):
    """Where weights come from, see `run_provenance`."""

    datasets: NotRequired[list[str]]
    plans_name: NotRequired[str]
    configuration: NotRequired[str]
    fold: NotRequired[Fold]
    spacing: NotRequired[Annotated[list[Positive], Field(max_length=3)]]
    transpose_forward: NotRequired[Axes]
    image_reader_writer: NotRequired[str]
    normalization: NotRequired[list[str]]
    intensity_properties: NotRequired[dict[str, dict[str, float | None]]]
    iterations: NotRequired[Number]
    loss_history: NotRequired[list[dict[str, float | None]]]
    crops_seen: NotRequired[dict[str, Number]]
    skipped_steps: NotRequired[list[SkippedStep]]
    cases: NotRequired[list[Record]]
    converted_from: NotRequired[str]
    note: NotRequired[str]


PROVENANCE = TypeAdapter(Provenance)


def check_provenance(provenance: Any, path: str) -> None:
    """Raise MiMError where a field is of another kind than its readers expect, or a CT channel's window is none."""
    checked(f"{path}, provenance", provenance, PROVENANCE, REMEDY)
    if len(provenance.get("spacing", ())) not in (0, 3) or sorted(provenance.get("transpose_forward", (0, 1, 2))) != [
        0, 1, 2,
    ]:  # fmt: skip
        raise MiMError(f"{path}: spacing or transpose_forward in provenance are not of three axes: {REMEDY}")
    iterations = [row.get("iteration") for row in provenance.get("loss_history", ())]
    if not all(number is not None and 0 <= number < math.inf for number in iterations):
        raise MiMError(f"{path}: a row of loss_history in provenance has no number of an iteration: {REMEDY}")
    windows = provenance.get("intensity_properties", {})
    for channel, scheme in enumerate(provenance.get("normalization", ())):
        window = windows.get(str(channel))
        if scheme == CT_NORMALIZATION and window and not is_window(window):
            raise _no_window(path, channel)


def require_description(provenance: Mapping[str, Any], in_channels: int, path: str) -> None:
    """Raise MiMError unless provenance that passed `check_provenance` holds all that a description needs."""
    if missing := [name for name in NEEDED if name not in provenance]:
        raise MiMError(f"{path}: provenance has no {', '.join(missing)}: {REMEDY}")
    schemes = provenance["normalization"]
    if len(schemes) != in_channels:
        raise MiMError(f"{path}: provenance is of {len(schemes)} channels, the network of {in_channels}: {REMEDY}")
    for channel, scheme in enumerate(schemes):
        if scheme == CT_NORMALIZATION and not provenance["intensity_properties"].get(str(channel)):
            raise _no_window(path, channel)


def _no_window(path: str, channel: int) -> MiMError:
    return MiMError(
        f"{path}: channel {channel} is CT, and intensity_properties in provenance hold no usable "
        f"{', '.join(WINDOW_FIELDS)} for it: {REMEDY}"
    )
