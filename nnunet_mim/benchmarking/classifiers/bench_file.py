"""An experiment of classifiers as a file. Its entries are the fields of the dataclasses in this module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from nnunet_mim.benchmarking.entries import Count, SlurmParameters, checkpoint_of, read_entries
from nnunet_mim.classification.baselines import BASELINE
from nnunet_mim.classification.options import LABELS_AS_ROI, MODES, RANDOM, ClassifyConfig
from nnunet_mim.config import CHECKPOINTS
from nnunet_mim.errors import MiMError
from nnunet_mim.settings import check_known_keys

OF_THE_MATRIX = {
    "mode": "give it as an entry of the arm",
    "checkpoint": "give it as an entry of the arm",
    "labelled": "give the entry labels",
    "seed": "give the entry seeds",
    "tag": "arms have names of their own",
}
"""settings of `mim_classify train` that other entries stand for, and what to do instead"""
SETTINGS = [entry.name for entry in fields(ClassifyConfig) if entry.name not in OF_THE_MATRIX]


@contextmanager
def named_as_entries() -> Iterator[None]:
    """Let a MiMError raised inside, as by `mim_classify train`, name the entries of the file in place of flags."""
    names = {**{name: name for name in SETTINGS}, "labelled": "labels", "seed": "seeds", "target": "target"}
    names |= {"where": "where", "mode": "mode"}
    try:
        yield
    except MiMError as error:
        command = r"\b(?:mim_|nnUNetv2_)\w+(?: --?\w+(?: (?!-)[^\s,;`]+)*)+"  # to be typed as it is
        named = re.sub(rf"{command}|(?<!\S)--(\w+)", lambda found: names.get(found[1], found[0]), str(error))
        raise MiMError(named) from error


@dataclass(frozen=True)
class ClassifierDataset:
    """A dataset of the experiment; all of its folds are trained."""

    dataset: str
    """number or name"""
    configuration: str = "3d_fullres"


@dataclass(frozen=True)
class ClassifierArm:
    """An arm as the user names it."""

    name: str
    mode: Literal["probe", "finetune", "scratch"] | None = None
    """None: the name is a mode"""
    checkpoint: str | None = None
    """as -pc of `mim_classify train`; none: random weights"""
    settings: Annotated[Mapping[str, Any], "names and values"] = field(default_factory=dict)
    """of `mim_classify train`, for this arm"""

    @property
    def from_random(self) -> bool:
        """Whether it starts from random weights."""
        return self.mode == "scratch" or self.checkpoint == RANDOM


@dataclass(frozen=True)
class ClassifierBench:
    """An experiment of classifiers as the user describes it."""

    target: tuple[str, ...]
    """columns of labels.csv"""
    datasets: tuple[ClassifierDataset, ...]
    arms: tuple[ClassifierArm, ...]
    labels: tuple[str, ...] = ("all",)
    """labelled training patients of a fold: numbers, percentages or all"""
    seeds: Count = 1
    plans: str = "nnUNetPlans"
    settings: Annotated[Mapping[str, Any], "names and values"] = field(default_factory=dict)
    """of `mim_classify train`, for all arms"""
    where: tuple[str, ...] = ()
    """column, minimum, and what is too large: the cases that count in the report; none: all"""
    control: str | None = None
    """name of the arm that the others are compared with"""
    device: Literal["cuda", "cpu", "mps"] = "cuda"
    gpus: tuple[str, ...] = ()
    jobs: Count = 1
    slurm: SlurmParameters | None = None
    output: Path = Path("bench")

    def __post_init__(self) -> None:
        if self.gpus and (self.device != "cuda" or self.slurm is not None):
            raise MiMError("'gpus' are for device cuda on this machine: leave them out")
        if self.where and len(self.where) != 3:
            raise MiMError(f"where: give a column and two numbers, such as [diameter_mm, 6, 12], not {len(self.where)}")
        for name in ("target", "labels"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise MiMError(f"{name}: give different ones, at least one")

    def config(self, arm: ClassifierArm, labels: str, seed: int) -> ClassifyConfig:
        """The settings of one training. Raises MiMError where one is bad."""
        given = {**self.settings, **arm.settings}
        fixed = {"mode": arm.mode, "checkpoint": arm.checkpoint, "labelled": labels, "seed": seed}
        return ClassifyConfig.from_dict({**given, **fixed})


def classifier_bench_of(content: Mapping[str, Any], folder: Path) -> ClassifierBench:
    """The experiment of a file's entries (docs/classification.md). Paths are relative to `folder`.

    Raises MiMError with the entry.
    """
    bench = read_entries(ClassifierBench, content)
    arms = tuple(_complete_arm(arm, folder) for arm in bench.arms)
    twins = [arm.checkpoint for arm in arms if arm.mode == "finetune"]
    arms = tuple(arm if arm.checkpoint else replace(arm, checkpoint=(*twins, RANDOM)[0]) for arm in arms)
    settings = _settings(bench.settings, "settings", folder)
    bench = replace(bench, arms=arms, settings=settings, control=_control(bench, arms), output=folder / bench.output)
    for labels in bench.labels:
        for arm in arms:
            try:
                with named_as_entries():
                    bench.config(arm, labels, 0)
            except MiMError as error:
                raise MiMError(f"arms: {arm.name}: {error}") from error
    return bench


def _complete_arm(arm: ClassifierArm, folder: Path) -> ClassifierArm:
    """An arm with its mode and the path of its checkpoint; that of --mode scratch may be missing still."""
    where = f"arms: {arm.name}"
    if not re.fullmatch(r"\w+", arm.name, re.ASCII) or arm.name.startswith(BASELINE):
        raise MiMError(f"{where}: a name has letters, digits and _ only, and does not begin with {BASELINE}")
    mode = arm.mode or (arm.name if arm.name in MODES else None)
    if mode is None:
        raise MiMError(f"{where}: give a mode: {', '.join(MODES[:-1])} or {MODES[-1]}")
    if mode != "scratch" and not arm.checkpoint:
        raise MiMError(f"{where}: give a checkpoint, or none for random weights: {CHECKPOINTS}")
    if mode == "finetune" and arm.checkpoint == RANDOM:
        raise MiMError(f"{where}: finetuning needs a checkpoint: name one, or give mode scratch")
    checkpoint = arm.checkpoint if arm.checkpoint in (None, RANDOM) else checkpoint_of(str(arm.checkpoint), folder)
    settings = _settings(arm.settings, f"{where}: settings", folder)
    return ClassifierArm(arm.name, mode, checkpoint, settings)  # type: ignore[arg-type]


def _settings(given: Mapping[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """Settings of `mim_classify train` with whole paths. Raises MiMError for one that is not known, or not for here."""
    for name, remedy in OF_THE_MATRIX.items():
        if name in given:
            raise MiMError(f"{where}: '{name}' is no setting here: {remedy}")
    check_known_keys(list(map(str, given)), SETTINGS, where)
    settings = {name: [value] if name in ("window", "covariate") and not isinstance(value, list) else value
                for name, value in given.items()}  # fmt: skip
    for name in ("labels", "roi"):
        if settings.get(name) and not (name == "roi" and settings[name] == LABELS_AS_ROI):
            settings[name] = str(folder / str(settings[name]))
    return settings


def _control(bench: ClassifierBench, arms: tuple[ClassifierArm, ...]) -> str:
    """Name of the arm that the others are compared with: the given one, else the first from random weights, else the
    last. MiMError where no arm has the given name.
    """
    names = [arm.name for arm in arms]
    if bench.control is not None and bench.control not in names:
        raise MiMError(f"control {bench.control} is none of the arms: {', '.join(names)}")
    return bench.control or next((arm.name for arm in arms if arm.from_random), names[-1])
