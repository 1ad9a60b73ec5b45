"""`bench.yaml`: an experiment as a file. Its entries are the fields of the dataclasses in this module.

The few-shot protocol is such a file too: one dataset and fold, few labels and all of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from nnunet_mim.benchmarking.classifiers.bench_file import ClassifierBench, classifier_bench_of
from nnunet_mim.benchmarking.entries import Count, SlurmParameters, checkpoint_of, read_entries
from nnunet_mim.benchmarking.seeded_training import Length
from nnunet_mim.errors import MiMError
from nnunet_mim.system.untrusted import read_yaml

MIM_PLANS = "nnUNetMiMPlans"
KNOWN_ARMS = {
    "MiM": ("nnUNetTrainerMiM", MIM_PLANS),
    "Scratch": ("nnUNetTrainerMiMScratch", MIM_PLANS),
    "nnUNet": ("nnUNetTrainer", "nnUNetPlans"),
    "ResEncL": ("nnUNetTrainer", "nnUNetResEncUNetLPlans"),
}
"""Trainer and plans of the arms that need only a name."""
TRAIN, PRETRAINED = "nnUNetv2_train", "nnUNetv2_train_pretrained"
LENGTH_SETTINGS = {"num_epochs", "iterations_per_epoch", "val_iterations_per_epoch"}


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset of the experiment."""

    dataset: str
    """number or name"""
    folds: tuple[Annotated[int, 0], ...] = (0,)
    configuration: str = "3d_fullres"

    def __post_init__(self) -> None:
        if not self.folds or len(set(self.folds)) < len(self.folds):
            raise MiMError(f"datasets: {self.dataset}: folds {list(self.folds)}: give different numbers from 0")


@dataclass(frozen=True)
class ArmSpec:
    """An arm as the user names it, for any dataset and fold."""

    name: str
    trainer: str = ""
    plans: str = ""
    checkpoint: str | None = None
    """a file, folder or Hugging Face name; {fold} and {dataset} in it are filled in"""
    settings: Annotated[Mapping[str, Any], "names and values"] = field(default_factory=dict)
    """settings of the recipe, for MiM trainers"""
    nnssl_plans: str | None = None
    """plans of nnUNetv2_preprocess_like_nnssl: the training command is nnUNetv2_train_pretrained"""

    @property
    def is_mim(self) -> bool:
        """Whether the trainer is one of this package, which follows the recipe in the plans."""
        return self.trainer.startswith("nnUNetTrainerMiM")

    @property
    def is_control(self) -> bool:
        """Whether it is this package's control, which starts from random weights."""
        return self.trainer.startswith("nnUNetTrainerMiMScratch")

    @property
    def command(self) -> str:
        """The command that trains."""
        return PRETRAINED if self.nnssl_plans else TRAIN


@dataclass(frozen=True)
class Bench:
    """An experiment as the user describes it."""

    datasets: tuple[DatasetSpec, ...]
    arms: tuple[ArmSpec, ...]
    labels: tuple[str, ...] = ("all",)
    seeds: Count = 1
    iterations: Count = 250_000
    iterations_per_epoch: Count = 250
    val_iterations: Count = 50
    control: str | None = None
    """name of the arm that the others are compared with"""
    device: Literal["cuda", "cpu", "mps"] = "cuda"
    gpus: tuple[str, ...] = ()
    """one training on each at a time; none: as this process sees them"""
    jobs: Count = 1
    """number of trainings at a time, without `gpus`"""
    slurm: SlurmParameters | None = None
    """None: this machine"""
    test: tuple[str, ...] = ()
    """other datasets (numbers or names in nnUNet_raw), whose cases every trained network predicts"""
    nsd_tolerance_mm: Annotated[float, 0] = 1.0
    output: Path = Path("bench")
    allow_seen: bool = False

    def __post_init__(self) -> None:
        if self.iterations % (per_epoch := self.iterations_per_epoch):
            raise MiMError(f"iterations ({self.iterations}) must be a multiple of iterations_per_epoch ({per_epoch})")
        if octal := [label for label in self.labels if re.fullmatch(r"0\d+%?", label)]:
            raise MiMError(f"labels {octal[0]}: leave the 0 in front out")
        if self.gpus and (self.device != "cuda" or self.slurm is not None):
            raise MiMError("'gpus' are for device cuda on this machine: leave them out")

    @property
    def length(self) -> Length:
        """The length of every training."""
        return Length(self.iterations // self.iterations_per_epoch, self.iterations_per_epoch, self.val_iterations)


def read_bench(path: Path) -> Bench | ClassifierBench:
    """Read and check a file: with `target` it is an experiment of classifiers. nnU-Net's folders are not looked at.

    Raises MiMError with the file and the entry.
    """
    try:
        content = read_yaml(path)
        make = classifier_bench_of if "target" in content else bench_of
        return make(content, path.resolve().parent)
    except MiMError as error:
        raise MiMError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def bench_of(content: Mapping[str, Any], folder: Path) -> Bench:
    """The experiment of a file's entries (docs/benchmark.md). `output` and checkpoints are relative to `folder`.

    Raises MiMError with the entry.
    """
    bench = read_entries(Bench, content)
    plans = {arm.plans for arm in bench.arms if arm.plans and _with_trainer(arm).is_mim}
    mim_plans = plans.pop() if len(plans) == 1 else MIM_PLANS  # the control's too
    arms = tuple(_complete_arm(arm, mim_plans, folder) for arm in bench.arms)
    return replace(bench, arms=arms, output=folder / bench.output)


def _complete_arm(arm: ArmSpec, mim_plans: str, folder: Path) -> ArmSpec:
    """An arm with the trainer and plans that its name stands for. MiMError names the arm where it is not complete.

    The path of its checkpoint is relative to `folder`; ORGANISATION/NAME is one on Hugging Face, and a name of shipped
    weights is theirs, unless it exists there.
    """
    where = f"arms: {arm.name}"
    if arm.nnssl_plans:
        if arm.plans or arm.checkpoint or arm.settings:
            raise MiMError(f"{where}: beside nnssl_plans only a trainer may be given")
        return replace(arm, trainer=arm.trainer or "PretrainedTrainer", plans=arm.nnssl_plans)
    _, known_plans = KNOWN_ARMS.get(arm.name, ("", ""))
    arm = replace(_with_trainer(arm), plans=arm.plans or (mim_plans if known_plans == MIM_PLANS else known_plans))
    if not arm.trainer or not arm.plans:
        raise MiMError(f"{where}: give trainer and plans (only {', '.join(KNOWN_ARMS)} need none)")
    if arm.settings and not arm.is_mim:
        raise MiMError(f"{where}: settings are for the MiM trainers, not for {arm.trainer}")
    if bad := sorted(LENGTH_SETTINGS & set(arm.settings)):
        remedy = "give iterations, iterations_per_epoch, val_iterations"
        raise MiMError(f"{where}: settings: {bad[0]} is the same for all arms: {remedy}")
    if not arm.checkpoint:
        return replace(arm, checkpoint=None)
    return replace(arm, checkpoint=checkpoint_of(arm.checkpoint, folder))


def default_arms(dataset: str, configuration: str) -> list[str]:
    """MiM, its control, and stock nnU-Net where its plans have been preprocessed."""
    folder = Path(os.environ["nnUNet_preprocessed"], dataset)
    if (folder / "nnUNetPlans.json").is_file() and (folder / f"nnUNetPlans_{configuration}").is_dir():
        return ["MiM", "Scratch", "nnUNet"]
    print(f"no stock arm: nnUNetPlans of {dataset} have not been preprocessed (nnUNetv2_plan_and_preprocess)")
    return ["MiM", "Scratch"]


def arm_entries(texts: Sequence[str], plans: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of all arms by name, from arms as on the command line and settings of the recipe (see below).

    Raises MiMError for a bad arm, two of the same name, or a setting of no MiM arm.
    """
    arms = [_parse_arm(text, plans) for text in texts]
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise MiMError(f"arm {max(names, key=names.count)} is there twice: every arm needs a name of its own")
    by_arm = _settings_by_arm(settings, arms)
    entries = {arm.name: asdict(replace(arm, settings=by_arm.get(arm.name, {}))) for arm in arms}
    return {name: {k: v for k, v in own.items() if v and k != "name"} for name, own in entries.items()}


def _parse_arm(text: str, plans: str) -> ArmSpec:
    """An arm from a known name, or NAME=TRAINER:PLANS[:CHECKPOINT]; `plans` for MiM arms and those that name none."""
    name, equals, description = text.partition("=")
    trainer, own_plans, checkpoint = [*description.split(":", 2), "", "", ""][:3]
    if not equals and name in KNOWN_ARMS:
        return _complete_arm(ArmSpec(name), plans, Path())
    if not trainer or not name:
        raise MiMError(f"--arms {text}: give {', '.join(KNOWN_ARMS)}, or NAME=TRAINER:PLANS[:CHECKPOINT]")
    return _complete_arm(ArmSpec(name, trainer, own_plans or plans, checkpoint or None), plans, Path.cwd())


def _settings_by_arm(settings: Mapping[str, Any], arms: Sequence[ArmSpec]) -> dict[str, dict[str, Any]]:
    """Settings of every MiM arm by its name: `key` counts for all of them, `ARM.key` for one."""
    by_arm: dict[str, dict[str, Any]] = {arm.name: {} for arm in arms if arm.is_mim}
    for key, value in sorted(settings.items(), key=lambda item: "." in item[0]):  # those of one arm come last
        arm, dot, own_key = key.rpartition(".")
        chosen = [name for name in by_arm if not dot or name == arm]
        if not chosen:
            there_are = f"there are {', '.join(by_arm) or 'none'}"
            raise MiMError(f"--set {key}: no MiM arm {arm or 'for it'} ({there_are}): leave it out")
        for name in chosen:
            by_arm[name][own_key] = value
    return by_arm


def _with_trainer(arm: ArmSpec) -> ArmSpec:
    return replace(arm, trainer=arm.trainer or KNOWN_ARMS.get(arm.name, ("", ""))[0])
