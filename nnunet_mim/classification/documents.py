"""What is needed of the JSON files that a classifier's folder holds, as schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from nnunet_mim.classification.results import RETRAIN, SETTINGS, TRAINING
from nnunet_mim.nnunet.documents import Name, Positive, checked, document
from nnunet_mim.system.untrusted import read_json

Number = Annotated[int, Field(ge=0, le=1_000_000_000)]
Targets = Annotated[dict[str, Annotated[list[str], Field(min_length=2)]], Field(min_length=1)]
"""classes by target"""


@document
class Options(TypedDict):
    """The settings of a training, as far as reports and cards name them; `ClassifyConfig` checks all."""

    roi: NotRequired[str]
    margin: NotRequired[float]
    labels: NotRequired[str]
    checkpoint: NotRequired[str]


@document
class Encoder(TypedDict):
    """The encoder of a fold; empty where there is none."""

    origin: NotRequired[str]
    sha256: NotRequired[str]
    architecture: NotRequired[dict[str, Any]]
    pretrained_on: NotRequired[list[str]]
    seen_validation_cases: NotRequired[list[str]]


@document
class FoldSettings(TypedDict):
    """settings.json of a fold."""

    config: Options
    targets: Targets
    encoder: Encoder
    spacing: NotRequired[list[Positive]]
    folds: NotRequired[str]
    n_training_cases: NotRequired[Number]
    n_validation_cases: NotRequired[Number]


@document
class ExportSettings(TypedDict):
    """settings.json of an export."""

    dataset: Name
    plans: Name
    configuration: str


@document
class Training(TypedDict):
    """training.json of a network; an export has the number of the cases of the inner split in place of their names."""

    temperatures: dict[str, Positive]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    skipped_steps: NotRequired[Number]
    history: NotRequired[list[dict[str, float]]]
    inner_cases: list[str] | Number


FOLD_SETTINGS, EXPORT_SETTINGS, TRAINED = TypeAdapter(FoldSettings), TypeAdapter(ExportSettings), TypeAdapter(Training)


def read_settings(fold: Path) -> dict[str, Any]:
    """settings.json in the folder of a fold. Raises MiMError for one that cannot be used."""
    return checked(str(fold / SETTINGS), read_json(fold / SETTINGS, RETRAIN), FOLD_SETTINGS, RETRAIN)


def read_export_settings(folder: Path) -> dict[str, Any]:
    """settings.json in the folder of an export. Raises MiMError for one that cannot be used."""
    remedy = "take another copy"
    return checked(str(folder / SETTINGS), read_json(folder / SETTINGS, remedy), EXPORT_SETTINGS, remedy)


def read_training(fold: Path) -> dict[str, Any]:
    """training.json in the folder of a fold. Raises MiMError for one that cannot be used."""
    return checked(str(fold / TRAINING), read_json(fold / TRAINING, RETRAIN), TRAINED, RETRAIN)
