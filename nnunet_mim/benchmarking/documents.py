"""What is needed of the JSON files that an experiment writes into the folders of its trainings, as schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from nnunet_mim.nnunet.documents import checked, document
from nnunet_mim.system.untrusted import read_json

DELETE = "delete its folder, and repeat the command"
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


@document
class Metrics(TypedDict):
    """Of a label in a case; NaN where it is neither in the prediction nor in the reference."""

    dice: float
    hd95: float
    nsd: float
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
    curve: Annotated[list[float], Field(min_length=1)]
    names: dict[str, str]
    tolerance: float
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
    auroc: dict[str, float]
    seen: list[str]


KEY_SCHEMA = TypeAdapter(dict[str, Any])
ATTEMPTS_SCHEMA, RESULT_SCHEMA = TypeAdapter(list[Attempt]), TypeAdapter(Result)
CLASSIFIER_COST_SCHEMA, CLASSIFIER_RESULT_SCHEMA = TypeAdapter(ClassifierCost), TypeAdapter(ClassifierResult)


def read_kept(file: Path, schema: TypeAdapter, remedy: str = DELETE) -> Any:
    """The content of a file that a training has written. Raises MiMError for one that does not fit its schema."""
    return checked(str(file), read_json(file, remedy), schema, remedy)
