"""`bench.yaml`: an experiment as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nnunet_mim.benchmarking.arms import KNOWN_ARMS, ArmSpec, known_arm
from nnunet_mim.benchmarking.cell import TRAIN, Length
from nnunet_mim.benchmarking.matrix import Bench, DatasetSpec
from nnunet_mim.errors import MiMError
from nnunet_mim.settings import read_yaml

DEFAULT_LENGTH = {"iterations": 250_000, "iterations_per_epoch": 250, "val_iterations": 50}
LENGTHS = {"num_epochs", "iterations_per_epoch", "val_iterations_per_epoch"}
PRETRAINED = "nnUNetv2_train_pretrained"


def read_bench(path: Path) -> Bench:
    """Read and check a file; nothing of nnU-Net's folders is looked at.

    Raises:
        MiMError: names the file and the entry.
    """
    try:
        return bench_of(read_yaml(path), path.resolve().parent)
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
        content = {str(name): None for name in _list(content)}
    return tuple(_arm(str(name), own or {}, folder) for name, own in content.items())


def _arm(name: str, own: Any, folder: Path) -> ArmSpec:
    _only(own, {"trainer", "plans", "checkpoint", "settings", "nnssl_plans"}, f"arms: {name}")
    if "nnssl_plans" in own:
        if set(own) - {"nnssl_plans", "trainer"}:
            raise MiMError(f"arms: {name}: beside nnssl_plans only a trainer may be given")
        return ArmSpec(name, str(own.get("trainer", "PretrainedTrainer")), str(own["nnssl_plans"]), command=PRETRAINED)
    known = known_arm(name)
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
    """Paths count from the folder of the file; anything that is neither there nor a .pth may be a Hugging Face name."""
    if not given:
        return None
    path = folder / str(given)
    return str(path) if path.suffix == ".pth" or path.exists() else str(given)


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
