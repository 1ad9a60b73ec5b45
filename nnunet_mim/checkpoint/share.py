"""Export of a pretraining for others: safetensors, settings, model card."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_mim.checkpoint.locate import CARD, CONFIG, INSTALL, WEIGHTS, read_shared
from nnunet_mim.errors import MiMError


def export(checkpoint: Mapping[str, Any], card: str, folder: Path, with_names: bool) -> None:
    """Write a folder that `-pc`, `--init` and `mim_inspect` take in place of a checkpoint file.

    Args:
        checkpoint: as `load_checkpoint` returns it.
        card: the model card, Markdown.
        folder: to be made; appears whole or not at all.
        with_names: keep the identifiers of the cases; otherwise only the hashes of their voxels, which the check for
            validation cases that were pretrained on needs.

    Raises:
        MiMError: the folder exists, cannot be written, or safetensors is missing.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MiMError(f"to write safetensors the package is missing: {INSTALL}") from error
    if checkpoint["mim_config"].get("encoder", "hybrid") != "hybrid":
        raise MiMError(
            "mim_export is for the encoder of nnUNetTrainerMiM; of --encoder resenc share the checkpoint file and "
            "its plans: nnU-Net's -pretrained_weights takes it as it is"
        )
    if folder.exists():
        raise MiMError(f"{folder} exists already: choose another one with -o")
    stored = {k: v for k, v in checkpoint.items() if k not in ("network_weights", "resume_state")}
    provenance = dict(stored["provenance"])
    if not with_names:
        provenance["cases"] = [{**record, "case": ""} for record in provenance["cases"]]
        provenance["skipped_steps"] = []
    settings = {**stored["mim_config"], "init_checkpoint": ""}  # a path of the user's
    weights = {name: value.contiguous() for name, value in checkpoint["network_weights"].items()}
    content = save(weights, metadata={"format": "pt"})
    config = {"sha256": hashlib.sha256(content).hexdigest(), **stored, "mim_config": settings, "provenance": provenance}
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        (temporary / WEIGHTS).write_bytes(content)
        (temporary / CONFIG).write_text(json.dumps(without_nan(config), indent=1), encoding="utf-8")
        (temporary / CARD).write_text(card, encoding="utf-8")
        read_shared(temporary)
        os.replace(temporary, folder)
    except OSError as error:
        raise MiMError(f"cannot write {folder} ({error.strerror}): free space, or choose another -o") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def without_nan(value: Any) -> Any:
    """Plain values in which None stands for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
