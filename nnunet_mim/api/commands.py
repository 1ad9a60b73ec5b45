"""The commands as functions: the same settings, checks and output, errors as exceptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from nnunet_mim.classification import cli as classification_cli
from nnunet_mim.classification.options import ClassifyConfig, MachineOptions
from nnunet_mim.classification.options import DataOptions as LabelledOptions
from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining import cli as pretraining_cli
from nnunet_mim.pretraining.options import DataOptions, RunOptions
from nnunet_mim.system.cli import as_typed


def pretrain(datasets: int | str | Sequence[int | str], **settings: Any) -> Path:
    """Pretrain, as `mim_pretrain` does, on one device.

    Args:
        datasets: number or name of a preprocessed dataset, or several.
        settings: fields of `DataOptions`, `PretrainConfig` and `RunOptions` (docs/config.md), such as
            plans="nnUNetMiMPlans", fold=0, iterations=2000, device="cpu", network={"depths": (2, 2, 2, 6)}.

    Returns:
        path of checkpoint_final.pth.

    Raises:
        MiMError: as the command's one-line errors.
        StoppedError: after a signal; what is done has been saved, and resume=True continues.
    """
    given = _known(settings, (DataOptions, PretrainConfig, RunOptions))
    return pretraining_cli.run(as_typed(config=None, set=[], datasets=_names(datasets), **given))


def classify(
    dataset: int | str, target: str | Sequence[str], folds: Sequence[int] | None = None, baselines: bool = True,
    device: str = "cuda", **settings: Any,
) -> Path:  # fmt: skip
    """Train a classifier, as `mim_classify train` does.

    Args:
        dataset: number or name of a preprocessed dataset with labels.csv.
        target: column of it, or several.
        folds: to train; None: all.
        baselines: train them too.
        device: cuda, cpu or mps.
        settings: fields of `ClassifyConfig`, `DataOptions` and `MachineOptions` of nnunet_mim.classification.options,
            such as mode="probe", roi="labels", checkpoint="tiny-ct", plans="nnUNetMiMPlans".

    Returns:
        folder of the results of this target, with report.html once all folds are there.

    Raises:
        MiMError: as the command's one-line errors.
    """
    given = _known(settings, (LabelledOptions, ClassifyConfig, MachineOptions))
    return classification_cli.train(
        as_typed(
            dataset=str(dataset), target=_names(target), device=device, baselines=baselines,
            fold=["all"] if folds is None else [str(fold) for fold in folds], **given,
        )
    )  # fmt: skip


def report(
    dataset: int | str, target: str | Sequence[str], seed: int = 0, saliency: bool = False, device: str = "cuda",
    **settings: Any,
) -> Path:  # fmt: skip
    """Compare what is trained, as `mim_classify report` does.

    Args:
        dataset: as in `classify`.
        target: as in `classify`.
        seed: of the bootstrap.
        saliency: show what the best trained network rests on, in its worst and best cases.
        device: cuda, cpu or mps; for the maps.
        settings: plans, configuration.

    Returns:
        folder with report.html, report.md and report.csv.

    Raises:
        MiMError: as the command's one-line errors.
    """
    given = _known(settings, (LabelledOptions,))
    return classification_cli.report(
        as_typed(
            dataset=str(dataset), target=_names(target), where=None, labels="", seed=seed, saliency=saliency,
            device=device, **given,
        )
    )  # fmt: skip


def _names(given: int | str | Sequence[int | str]) -> list[str]:
    return [str(given)] if isinstance(given, int | str) else [str(one) for one in given]


def _known(settings: Mapping[str, Any], kinds: Sequence[type]) -> dict[str, Any]:
    """Settings that are fields of these dataclasses; folds are texts there. Raises MiMError for any other."""
    names = {entry.name for kind in kinds for entry in fields(kind)}
    if unknown := sorted(set(settings) - names):
        raise MiMError(f"unknown setting '{unknown[0]}': take one of {', '.join(sorted(names))}")
    return {name: str(value) if name == "fold" else value for name, value in settings.items()}
