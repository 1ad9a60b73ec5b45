"""Where a checkpoint lies: a file, a folder of `mim_export`, a repository on Hugging Face, or another dataset's run.

A pretraining on several datasets lies with the first one's results; the others hold a pointer to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from nnunet_mim.errors import MiMError
from nnunet_mim.system.files import write_atomically

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
INSTALL = "pip install 'nnunet_mim[share]'"


def locate(name: str | Path) -> Path:
    """Where a checkpoint lies on this machine.

    Args:
        name: a `.pth` file, a folder of `mim_export`, or a repository on Hugging Face (`user/name`,
            `user/name@revision`), which is downloaded into huggingface_hub's cache.

    Returns:
        The absolute path of a file or folder.

    Raises:
        MiMError: it does not exist, or cannot be downloaded.
    """
    path = Path(name)
    if path.is_file():
        return path.absolute()
    if path.is_dir():
        if missing := [file for file in (WEIGHTS, CONFIG) if not (path / file).is_file()]:
            raise MiMError(f"{path} holds no {missing[0]}: give a checkpoint_final.pth, or a folder of mim_export")
        return path.absolute()
    text = str(name)
    if REPOSITORY.fullmatch(text) and path.suffix not in (".pth", ".pt") and not path.parent.exists():
        return download(text)
    raise MiMError(f"pretraining checkpoint {path} does not exist")


def download(name: str) -> Path:
    """Fetch a repository from Hugging Face (or take it from the cache) and return its folder.

    Raises:
        MiMError: huggingface_hub is missing, there is no such repository, or no connection.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MiMError(f"{name} is no file here, and to download it huggingface_hub is missing: {INSTALL}") from error
    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=[WEIGHTS, CONFIG, CARD])
    except Exception as error:  # the library has many
        raise MiMError(
            f"{name} is no file here and cannot be downloaded from Hugging Face ({type(error).__name__}): correct the "
            "name, or download it by hand and give the folder"
        ) from error
    return locate(folder)


def read_shared(folder: Path) -> dict[str, Any]:
    """A folder of `mim_export` as the dict that a checkpoint file holds; nothing in it is executed.

    Raises:
        MiMError: damaged, incomplete, or safetensors is not installed.
    """
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise MiMError(f"to read {folder / WEIGHTS} safetensors is missing: {INSTALL}") from error
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        content = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(content).hexdigest() != config.pop("sha256"):
            raise ValueError("the weights have another checksum than config.json says")
        return {"network_weights": load(content), **config}
    except Exception as error:  # safetensors has errors of its own
        raise MiMError(
            f"{folder} is no readable export ({type(error).__name__}: {' '.join(str(error).split())[:200]}): take "
            "another copy"
        ) from error

POINTER = "checkpoint_final.json"


def write_pointer(folder: Path, checkpoint: Path) -> None:
    """Leave a file in a run folder of another dataset that names the checkpoint, relative to itself."""
    folder.mkdir(parents=True, exist_ok=True)
    relative = Path(os.path.relpath(checkpoint, folder)).as_posix()
    write_atomically(folder / POINTER, json.dumps({"checkpoint": relative}).encode())


def read_pointer(folder: Path) -> Path | None:
    """The checkpoint that a run folder points at; None where there is no pointer or no such file any more."""
    try:
        path = folder / json.loads((folder / POINTER).read_text())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Path(os.path.normpath(path)) if path.is_file() else None
