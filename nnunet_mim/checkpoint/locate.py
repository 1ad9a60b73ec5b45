"""Where checkpoints lie, and which one a finetuning starts from.

A checkpoint is a file of `mim_pretrain`, a folder of `mim_export`, weights that come with the package, or a repository
on Hugging Face. A pretraining on several datasets lies with the first one's results; the run folders of the others hold
a pointer to it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnunet_mim.checkpoint.case_list import PATTERN
from nnunet_mim.errors import MiMError
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.untrusted import NOT_REGULAR, read_json

FINAL = "checkpoint_final.pth"
"""the checkpoint of a finished run, as in nnU-Net's own trainings"""
LATEST = "checkpoint_latest.pth"
"""the checkpoint of an unfinished run, as in nnU-Net's own trainings: with everything needed to continue it"""
BEST = "checkpoint_best.pth"
"""the weights with the lowest loss on held-out cases"""
POINTER = "checkpoint_final.json"
"""names the checkpoint, relative to its own folder"""
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
"""the files of an export"""

ENV_CHECKPOINT = "nnUNet_mim_checkpoint"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
SHIPPED = Path(__file__).parents[1] / "weights"
"""exports that come with the package; each folder's name stands for it in all commands"""
UNPICKLED = "nnU-Net runs what is in such a file; as it is now, this one has passed the checks of mim_inspect"
"""stands with printed commands that hand a checkpoint to nnU-Net"""
INSTALL = "pip install 'nnunet_mim[share]'"


def locate(name: str | Path) -> Path:
    """Absolute path of a checkpoint file or of an export's folder on this machine.

    Args:
        name: a `.pth` file, a folder of `mim_export`, weights that come with the package (`tiny-ct`; a file or folder
            here of that name goes before them), or a repository on Hugging Face (`user/name`, `user/name@revision`),
            which is downloaded into huggingface_hub's cache.

    Raises:
        MiMError: it does not exist, or cannot be downloaded.
    """
    path = Path(name)
    if path.is_file():
        return path.absolute()
    if path.is_dir():
        if missing := [file for file in (WEIGHTS, CONFIG) if not (path / file).is_file()]:
            raise MiMError(f"{path} holds no {missing[0]}: give a {FINAL}, or a folder of mim_export")
        return path.absolute()
    if str(name) in shipped_weights():
        return SHIPPED / name
    if is_name(str(name)) and not path.parent.exists():
        return _download(str(name))
    if path.exists():
        raise MiMError(f"pretraining checkpoint {path} is {NOT_REGULAR}: copy it into a file")
    choices = " or ".join(["correct the path", *(f"give {name}" for name in shipped_weights())])
    raise MiMError(f"pretraining checkpoint {path} does not exist: {choices}")


def is_name(text: str) -> bool:
    """Whether a text that is no file or folder names a checkpoint: weights of the package, or a repository."""
    return text in shipped_weights() or bool(REPOSITORY.fullmatch(text) and not text.endswith((".pth", ".pt")))


def shipped_weights() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def lasting_name(name: str | Path) -> str:
    """What plans and settings keep of a checkpoint: the name of weights that come with the package, else the path."""
    path = locate(name)
    return path.name if path.parent == SHIPPED else str(path)


def _download(name: str) -> Path:
    """Fetch a repository from Hugging Face (or take it from the cache) and return its folder."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MiMError(f"{name} is no file here, and to download it huggingface_hub is missing: {INSTALL}") from error
    repository, _, revision = name.partition("@")
    try:
        wanted = [WEIGHTS, CONFIG, CARD, PATTERN]
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=wanted)
    except Exception as error:  # the library has many
        raise MiMError(
            f"{name} is no file here and cannot be downloaded from Hugging Face ({type(error).__name__}): correct the "
            "name, or download it by hand and give the folder"
        ) from error
    return locate(folder)


def write_pointers(folders: Iterable[Path], checkpoint: Path) -> None:
    """Leave a file that names the checkpoint in the run folders of other datasets."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        relative = Path(os.path.relpath(checkpoint, folder)).as_posix()
        write_atomically(folder / POINTER, json.dumps({"checkpoint": relative}).encode())


def _read_pointer(folder: Path) -> Path | None:
    """The checkpoint that a run folder points at; None where there is no pointer or no such file any more."""
    try:
        path = folder / read_json(folder / POINTER)["checkpoint"]
    except (MiMError, KeyError, TypeError):
        return None
    return Path(os.path.normpath(path)) if os.path.isfile(path) else None  # any text may stand there


def _final_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a finished run: in its folder or where its pointer leads, the newer of both; None without."""
    own = folder / FINAL
    found = [path for path in (own if own.is_file() else None, _read_pointer(folder)) if path is not None]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def find_checkpoint(plans: dict[str, Any], configuration: str, fold: int | str, results: str | Path) -> Path | None:
    """The checkpoint that a fresh finetuning takes its encoder from; first hit wins.

    The environment variable nnUNet_mim_checkpoint, `plans["pretrain_info"]["checkpoint_path"]`, then the finished
    `mim_pretrain` run on this dataset (alone or with others), plans and configuration that left out this fold, then the
    one that used all cases. None where nothing was named and no finished run exists.

    Args:
        plans: content of the plans file.
        configuration: e.g. 3d_fullres.
        fold: number or "all".
        results: the nnUNet_results folder.

    Raises:
        MiMError: a named file is missing, or several tagged runs match.
    """
    named = [
        (os.environ.get(ENV_CHECKPOINT), f"environment variable {ENV_CHECKPOINT}"),
        ((plans.get("pretrain_info") or {}).get("checkpoint_path"), "pretrain_info in the plans file"),
    ]
    for path, place in named:
        if path:
            try:
                return locate(path)
            except MiMError as error:
                raise MiMError(f"{place}: {error}") from error
    for name in dict.fromkeys((f"fold_{fold}", "fold_all")):
        runs = _pretraining_runs(plans, configuration, results)
        found = {run: path for run in runs if (path := _final_checkpoint(run / name)) is not None}
        untagged = [path for run, path in found.items() if run.name.startswith("MiMPretrain__")]
        candidates = untagged or list(found.values())
        if len(candidates) > 1:
            shown = ", ".join(map(str, candidates))
            raise MiMError(f"several pretraining runs fit ({shown}): choose one, {ENV_CHECKPOINT}=CHECKPOINT")
        if candidates:
            return candidates[0]
    return None


def no_checkpoint_error(
    plans: dict[str, Any], configuration: str, fold: int | str, results: str | Path, otherwise: str = ""
) -> MiMError:
    """The error of a finetuning without a checkpoint to start from: what to do, and which checkpoints do not fit.

    Arguments as of `find_checkpoint`; `otherwise` is what to do but pretrain, where it is not nnUNetv2_train.
    """
    of_train = (
        f"set {ENV_CHECKPOINT}=CHECKPOINT, or write plans with `mim_plan -d {plans['dataset_name'][7:10]} -pc "
        "CHECKPOINT`; without pretraining use -tr nnUNetTrainerMiMScratch"
    )
    runs = _pretraining_runs(plans, configuration, results)
    others = sorted(str(path) for run in runs for path in run.glob("fold_*/checkpoint_*.pth"))
    dataset, plans_name = plans["dataset_name"], plans["plans_name"]
    hint = f" (not used, of another fold or unfinished: {', '.join(others)})" if others else ""
    fold_option = "" if fold == "all" else f" -f {fold}"
    command = f"mim_pretrain -d {dataset[7:10]} -p {plans_name} -c {configuration}{fold_option}"
    return MiMError(
        f"no pretraining checkpoint for {dataset}, {plans_name}, {configuration}, fold {fold}{hint}: run `{command}`, "
        f"or {otherwise or of_train}"
    )


def _pretraining_runs(plans: dict[str, Any], configuration: str, results: str | Path) -> list[Path]:
    pattern = f"MiMPretrain*__{plans['plans_name']}__{configuration}"
    return sorted(Path(results, plans["dataset_name"]).glob(pattern))
