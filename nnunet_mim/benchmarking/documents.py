"""What is needed of the JSON files that an experiment writes into the folders of its trainings, as schemas."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import checked, document
from nnunet_mim.system.untrusted import read_json

DELETE = "delete its folder, and repeat the command"
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


def _share(value: float) -> float:
    if not (math.isnan(value) or 0 <= value <= 1):
        raise ValueError("it should be from 0 to 1, or NaN")
    return value


def _distance(value: float) -> float:
    if not (math.isnan(value) or 0 <= value < math.inf):
        raise ValueError("it should be 0 or more, or NaN")
    return value


Share = Annotated[float, AfterValidator(_share)]
"""from 0 to 1, or NaN where a metric has no value"""
Distance = Annotated[float, AfterValidator(_distance)]
"""mm, or NaN"""


@document
class Metrics(TypedDict):
    """Of a label in a case; NaN where it is neither in the prediction nor in the reference."""

    dice: Share
    hd95: Distance
    nsd: Share
    n_ref: Count
    n_pred: Count


Cases = Annotated[dict[str, dict[str, Metrics]], Field(min_length=1)]
"""by case and label"""


@document
class Cost(TypedDict):
    """Of an attempt at a training, or of all."""

    seconds: Number
    peak_bytes: Number
    parameters: Count
    device: str


@document
class Attempt(Cost):
    """An entry of cost.json."""

    began: Number


@document
class Result(TypedDict):
    """result.json of a training."""

    cases: Cases
    curve: Annotated[list[Share], Field(min_length=1)]
    names: dict[str, str]
    tolerance: Number
    cost: Cost | Annotated[dict[str, Any], Field(max_length=0)]
    tests: NotRequired[dict[str, Cases]]


@document
class ClassifierCost(TypedDict):
    """cost.json of a classifier."""

    seconds: Number


@document
class ClassifierResult(TypedDict):
    """result.json of a classifier."""

    seconds: Number
    auroc: dict[str, Share]
    seen: list[str]


KEY_SCHEMA = TypeAdapter(dict[str, Any])
ATTEMPTS_SCHEMA, RESULT_SCHEMA = TypeAdapter(list[Attempt]), TypeAdapter(Result)
CLASSIFIER_COST_SCHEMA, CLASSIFIER_RESULT_SCHEMA = TypeAdapter(ClassifierCost), TypeAdapter(ClassifierResult)


def read_kept(file: Path, schema: TypeAdapter, remedy: str = DELETE) -> Any:
    """The content of a file that a training has written. Raises MiMError for one that does not fit its schema."""
    return checked(str(file), read_json(file, remedy), schema, remedy)


def read_result(file: Path, cases: Iterable[str]) -> dict[str, Any]:
    """result.json of a training. Raises MiMError for one that does not fit, or is not of these validation cases and the
    same labels in each.
    """
    result = read_kept(file, RESULT_SCHEMA)
    if {*result["cases"]} != {*cases}:
        raise MiMError(f"{file} is not of the validation cases of its fold: {DELETE}")
    for found in (result["cases"], *result.get("tests", {}).values()):
        if len({frozenset(labels) for labels in found.values()}) != 1 or not next(iter(found.values())):
            raise MiMError(f"{file} has other labels in some cases than in others, or none: {DELETE}")
    return result
