"""`bench.yaml`: an experiment as a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nnunet_mim.benchmarking.arms import KNOWN_ARMS, MIM_PLANS, ArmSpec, known_arm
from nnunet_mim.benchmarking.cell import TRAIN, Length
from nnunet_mim.benchmarking.matrix import Bench, DatasetSpec
from nnunet_mim.checkpoint.locate import REPOSITORY
from nnunet_mim.errors import MiMError
from nnunet_mim.settings import read_yaml

DEFAULT_LENGTH = {"iterations": 250_000, "iterations_per_epoch": 250, "val_iterations": 50}
LENGTHS = {"num_epochs", "iterations_per_epoch", "val_iterations_per_epoch"}
OCTAL = re.compile(r"(?<![\w.%/-])0\d+(?![\w.%/-])")
PRETRAINED = "nnUNetv2_train_pretrained"


def read_bench(path: Path) -> Bench:
    """Read and check a file; nothing of nnU-Net's folders is looked at.

    Raises:
        MiMError: names the file and the entry.
    """
    try:
        content = read_yaml(path)
        if octal := OCTAL.search(path.read_text()):
            raise MiMError(f"{octal[0]}: YAML reads numbers that begin with 0 as octal ones: leave the 0 out")
        return bench_of(content, path.resolve().parent)
    except MiMError as error:
        raise MiMError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def bench_of(content: Mapping[str, Any], folder: Path) -> Bench:
    """The experiment that a file's content stands for.

    Args:
        content: see docs/benchmark.md.
        folder: that `output` and the paths of checkpoints count from.

    Raises:
        MiMError: names the entry.
    """
    known = {f.name for f in fields(Bench)} - {"length"} | set(DEFAULT_LENGTH)
    _only(content, known, "")
    values = {key: value for key, value in content.items() if value is not None}
    for name in ("datasets", "arms"):
        if not values.get(name):
            raise MiMError(f"'{name}' is missing")
    lengths = {name: _count(values, name, default) for name, default in DEFAULT_LENGTH.items()}
    labels = values.get("labels", ["all"])
    slurm = values.get("slurm")
    if slurm is not None and not isinstance(slurm, dict):
        raise MiMError("'slurm' holds parameters of submitit, such as {slurm_partition: gpu, timeout_min: 1440}")
    tolerance = values.get("nsd_tolerance_mm", 1.0)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise MiMError(f"nsd_tolerance_mm {tolerance}: give millimetres")
    device = str(values.get("device", "cuda"))
    if device not in ("cuda", "cpu", "mps"):
        raise MiMError(f"device {device}: give cuda, cpu or mps")
    gpus = tuple(str(gpu) for gpu in _list(values.get("gpus", [])))
    if gpus and (device != "cuda" or slurm is not None):
        raise MiMError("'gpus' are for device cuda on this machine: leave them out")
    return Bench(
        datasets=_datasets(values["datasets"]),
        arms=_arms(values["arms"], folder),
        labels=tuple(str(entry) for entry in _list(labels)),
        seeds=_count(values, "seeds", 1),
        length=length_of(**lengths),
        output=folder / str(values.get("output", "bench")),
        control=str(values["control"]) if "control" in values else None,
        device=device,
        gpus=gpus,
        jobs=_count(values, "jobs", 1),
        slurm=slurm,
        nsd_tolerance_mm=float(tolerance),
        allow_seen=values.get("allow_seen", False) is True,
    )


def length_of(iterations: int, iterations_per_epoch: int, val_iterations: int) -> Length:
    """MiMError unless the iterations are whole epochs."""
    if iterations % iterations_per_epoch:
        raise MiMError(f"iterations ({iterations}) must be a multiple of iterations_per_epoch ({iterations_per_epoch})")
    return Length(iterations // iterations_per_epoch, iterations_per_epoch, val_iterations)


def check_settings(settings: Mapping[str, Any], arm: str) -> None:
    """MiMError where an arm's recipe holds the length, which is the experiment's."""
    if bad := sorted(LENGTHS & set(settings)):
        raise MiMError(
            f"{arm}: {bad[0]} is the same for all arms: give iterations, iterations_per_epoch, val_iterations"
        )


def _datasets(content: Any) -> tuple[DatasetSpec, ...]:
    if not isinstance(content, dict):
        return tuple(DatasetSpec(str(name)) for name in _list(content))
    specs = []
    for name, own in content.items():
        own = own or {}
        _only(own, {"folds", "configuration"}, f"datasets: {name}")
        folds = _list(own.get("folds", [0]))
        if not folds or not all(isinstance(fold, int) and fold >= 0 for fold in folds) or len({*folds}) < len(folds):
            raise MiMError(f"datasets: {name}: folds {folds}: give different numbers from 0")
        specs.append(DatasetSpec(str(name), tuple(folds), str(own.get("configuration", "3d_fullres"))))
    return tuple(specs)


def _arms(content: Any, folder: Path) -> tuple[ArmSpec, ...]:
    if not isinstance(content, dict):
        names = [str(name) for name in _list(content)]
        if len(set(names)) < len(names):
            raise MiMError(f"arms: {max(names, key=names.count)} is there twice")
        content = dict.fromkeys(names)
    said = {name: own for name, own in content.items() if isinstance(own, dict) and own.get("plans")}
    given = {own["plans"] for name, own in said.items() if _is_mim(name, own)}
    mim_plans = str(given.pop()) if len(given) == 1 else MIM_PLANS  # the control's too
    return tuple(_arm(str(name), own or {}, folder, mim_plans) for name, own in content.items())


def _is_mim(name: Any, own: Mapping[str, Any]) -> bool:
    known = known_arm(str(name))
    return str(own.get("trainer") or (known.trainer if known else "")).startswith("nnUNetTrainerMiM")


def _arm(name: str, own: Any, folder: Path, mim_plans: str) -> ArmSpec:
    _only(own, {"trainer", "plans", "checkpoint", "settings", "nnssl_plans"}, f"arms: {name}")
    if "nnssl_plans" in own:
        if set(own) - {"nnssl_plans", "trainer"}:
            raise MiMError(f"arms: {name}: beside nnssl_plans only a trainer may be given")
        return ArmSpec(name, str(own.get("trainer", "PretrainedTrainer")), str(own["nnssl_plans"]), command=PRETRAINED)
    known = known_arm(name, mim_plans)
    trainer, plans = own.get("trainer", known and known.trainer), own.get("plans", known and known.plans)
    if not trainer or not plans:
        raise MiMError(f"arms: {name}: give trainer and plans (only {', '.join(KNOWN_ARMS)} need none)")
    settings = own.get("settings") or {}
    if not isinstance(settings, dict):
        raise MiMError(f"arms: {name}: settings: give names and values")
    if settings and not str(trainer).startswith("nnUNetTrainerMiM"):
        raise MiMError(f"arms: {name}: settings are for the MiM trainers, not for {trainer}")
    check_settings(settings, f"arms: {name}: settings")
    return ArmSpec(name, str(trainer), str(plans), _checkpoint(own.get("checkpoint"), folder), settings, TRAIN)


def _checkpoint(given: Any, folder: Path) -> str | None:
    """Paths count from the folder of the file; ORGANISATION/NAME is one on Hugging Face unless it is there."""
    if not given:
        return None
    path = folder / str(given)
    elsewhere = REPOSITORY.fullmatch(str(given)) and path.suffix != ".pth" and not path.exists()
    return str(given) if elsewhere else str(path)


def _only(content: Any, known: set[str], where: str) -> None:
    prefix = f"{where}: " if where else ""
    if not isinstance(content, dict | Mapping):
        raise MiMError(f"{prefix}give names and values ({', '.join(sorted(known))})")
    if strange := sorted(set(map(str, content)) - known):
        raise MiMError(f"{prefix}unknown entry '{strange[0]}': there are {', '.join(sorted(known))}")


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _count(values: Mapping[str, Any], name: str, default: int) -> int:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MiMError(f"{name} {value}: give a whole number from 1")
    return value
