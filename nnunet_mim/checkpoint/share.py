"""Exports: a pretraining as a folder of safetensors, settings and a model card."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nnunet_mim.checkpoint.case_list import put_aside
from nnunet_mim.checkpoint.locate import CARD, CONFIG, INSTALL, WEIGHTS
from nnunet_mim.errors import MiMError
from nnunet_mim.system.untrusted import limited, read_json

HALF = (torch.float16, torch.bfloat16)


def export(
    checkpoint: Mapping[str, Any], card: str, folder: Path, with_names: bool, half: bool = False
) -> None:
    """Write a folder that every command takes in place of the checkpoint file.

    Args:
        checkpoint: as of `load_checkpoint`.
        card: Markdown.
        folder: to be made; appears whole or not at all.
        with_names: keep the identifiers of the cases. The hashes of their voxels always stay: finetuning recognises
            validation cases that were pretrained on by them.
        half: write float16, half the size; a value beyond its range is an error.

    Raises:
        MiMError: the folder exists, cannot be written, or safetensors is missing.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MiMError(f"to write safetensors the package is missing: {INSTALL}") from error
    if checkpoint["mim_config"].get("encoder", "hybrid") != "hybrid":
        raise MiMError(
            "mim_export is for the encoder of nnUNetTrainerMiM; of mim_pretrain with --encoder resenc share the "
            "checkpoint file and its plans: nnUNetv2_train takes it with -pretrained_weights as it is; whoever takes "
            "it runs mim_inspect on it, since nnU-Net runs what is in such a file"
        )
    if folder.exists():
        raise MiMError(f"{folder} exists already: choose another one with -o")
    config = {key: value for key, value in checkpoint.items() if key not in ("network_weights", "resume_state")}
    config["mim_config"] = {**config["mim_config"], "init_checkpoint": ""}  # a path of the user's
    if not with_names:
        cases = [{**record, "case": ""} for record in config["provenance"]["cases"]]
        config["provenance"] = {**config["provenance"], "cases": cases, "skipped_steps": []}
    weights = {name: value.contiguous() for name, value in checkpoint["network_weights"].items()}
    if half:
        weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    content = save(weights, metadata={"format": "pt"})
    config = {"sha256": hashlib.sha256(content).hexdigest(), **config}
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        (temporary / WEIGHTS).write_bytes(content)
        config["provenance"] = put_aside(config["provenance"], temporary)
        (temporary / CONFIG).write_text(json.dumps(_without_nan(config), indent=1), encoding="utf-8")
        (temporary / CARD).write_text(card, encoding="utf-8")
        if any(not value.isfinite().all() for value in read_export(temporary)["network_weights"].values()):
            raise MiMError("weights are beyond the range of float16: leave out --half")
        os.replace(temporary, folder)
    except OSError as error:
        raise MiMError(f"cannot write {folder} ({error.strerror}): free space, or choose another -o") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_export(folder: Path) -> dict[str, Any]:
    """Read a folder of `mim_export` as the dict that a checkpoint file holds; nothing in it is executed.

    Weights in half precision become float32.

    Raises:
        MiMError: damaged, incomplete, or safetensors is not installed.
    """
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise MiMError(f"to read {folder / WEIGHTS} safetensors is missing: {INSTALL}") from error
    try:
        config = read_json(folder / CONFIG, "take another copy")
        content = limited(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size)
        if hashlib.sha256(content).hexdigest() != config.pop("sha256"):
            raise ValueError("the weights have another checksum than config.json says")
        weights = {name: w.float() if w.dtype in HALF else w for name, w in load(content).items()}
        return {"network_weights": weights, **config}
    except Exception as error:  # safetensors has errors of its own
        raise MiMError(
            f"{folder} is no readable export ({type(error).__name__}: {' '.join(str(error).split())[:200]}): take "
            "another copy"
        ) from error


def _without_nan(value: Any) -> Any:
    """Copy plain values, with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
