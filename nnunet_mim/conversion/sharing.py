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

from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining.checkpoint import CITATIONS
from nnunet_mim.pretraining.summary import Facts, network_text
from nnunet_mim.shared import CARD, CONFIG, INSTALL, WEIGHTS, read_shared


def export(facts: Facts, folder: Path, licence: str | None, data: str | None, with_names: bool) -> None:
    """Write a folder that `-pc`, `--init` and `mim_inspect` take in place of a checkpoint file.

    Args:
        facts: of the checkpoint.
        folder: to be made; appears whole or not at all.
        licence: of the weights, an identifier such as cc-by-4.0; None: the card says that it is not stated.
        data: a sentence on the images and their licence; None: the card says that it is not stated.
        with_names: keep the identifiers of the cases; otherwise only the hashes of their voxels, which the check for
            validation cases that were pretrained on needs.

    Raises:
        MiMError: the folder exists, cannot be written, or safetensors is missing.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MiMError(f"to write safetensors the package is missing: {INSTALL}") from error
    if facts.config.encoder != "hybrid":
        raise MiMError(
            "mim_export is for the encoder of nnUNetTrainerMiM; of --encoder resenc share the checkpoint file and "
            "its plans: nnU-Net's -pretrained_weights takes it as it is"
        )
    if folder.exists():
        raise MiMError(f"{folder} exists already: choose another one with -o")
    stored = {k: v for k, v in facts.checkpoint.items() if k not in ("network_weights", "resume_state")}
    provenance = dict(stored["provenance"])
    if not with_names:
        provenance["cases"] = [{**record, "case": ""} for record in provenance["cases"]]
        provenance["skipped_steps"] = []
    settings = {**stored["mim_config"], "init_checkpoint": ""}  # a path of the user's
    weights = {name: value.contiguous() for name, value in facts.checkpoint["network_weights"].items()}
    content = save(weights, metadata={"format": "pt"})
    config = {"sha256": hashlib.sha256(content).hexdigest(), **stored, "mim_config": settings, "provenance": provenance}
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        (temporary / WEIGHTS).write_bytes(content)
        (temporary / CONFIG).write_text(json.dumps(without_nan(config), indent=1), encoding="utf-8")
        (temporary / CARD).write_text(model_card(facts, licence, data), encoding="utf-8")
        read_shared(temporary)
        os.replace(temporary, folder)
    except OSError as error:
        raise MiMError(f"cannot write {folder} ({error.strerror}): free space, or choose another -o") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_card(facts: Facts, licence: str | None, data: str | None) -> str:
    """Text for those who find the folder: what it is, what it was trained on, how good, how to use and to cite it."""
    provenance = facts.provenance
    cases, datasets = len(provenance["cases"]), len(provenance["datasets"])
    schemes = ", ".join(map(str, provenance["normalization"])) or "unknown"
    origin = f"{provenance['iterations']} iterations of {facts.config.batch_size} crops"
    if "converted_from" in provenance:
        origin = f"converted from {provenance['converted_from']}. {provenance.get('note', '')}"
    spacing = " x ".join(f"{s:g}" for s in facts.spacing) or "unknown"
    lines = [
        "---",
        "library_name: nnunet_mim",
        *([f"license: {licence}"] if licence else []),
        "tags: [medical, ct, nnu-net, self-supervised-learning, mask-in-mask]",
        "---",
        "",
        f"# MiM-pretrained encoder ({facts.config.preset})",
        "",
        "Self-supervised pretraining by Mask in Mask on CT, to be finetuned with nnU-Net.",
        "",
        f"- Network: {network_text(facts)}",
        f"- Data: {data or 'not stated'}; {cases} cases of {datasets} dataset(s), resampled to {spacing} mm",
        f"- Input: {facts.config.in_channels} channel(s), {schemes}",
        f"- Training: {origin}",
        f"- Licence of the weights: {licence or 'not stated: ask those who made them before you use them'}",
        "",
        "## Measured on held-out cases",
        "",
        *metrics_table(facts),
        "",
        "## Use",
        "",
        "```bash",
        "pip install 'nnunet_mim[share]'",
        "mim_plan -d DATASET -pc THIS_FOLDER_OR_REPOSITORY",
        "nnUNetv2_preprocess -d DATASET -plans_name nnUNetMiMPlans -c 3d_fullres",
        "nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerMiM -p nnUNetMiMPlans",
        "```",
        "",
        "`config.json` holds a hash of the voxels of every case that was trained on; `nnUNetTrainerMiM` warns if a",
        "validation case is among them.",
        "",
        "## Cite",
        "",
        *[f"- {citation}" for citation in CITATIONS],
    ]
    return "\n".join(lines) + "\n"


def without_nan(value: Any) -> Any:
    """Plain values in which None stands for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metrics_table(facts: Facts) -> list[str]:
    """Last losses beside the trivial predictors, and the label probe, as Markdown."""
    last: Mapping[str, Any] = facts.history[-1] if facts.history else {}
    names = [name for name in last if name.startswith("val/level") and name.endswith("/reconstruction")]
    levels = sorted(name.split("/")[1] for name in names)
    if not levels:
        return ["nothing is known"]
    lines = ["| | token mean | in-filling | network |", "|---|---|---|---|"]
    for level in levels:
        row = [last.get(f"baseline/{level}/{name}") for name in ("token_mean", "infill")]
        numbers = [*row, last[f"val/{level}/reconstruction"]]
        shown = " | ".join("" if number is None else f"{number:.3f}" for number in numbers)
        lines.append(f"| reconstruction loss, {level} | {shown} |")
    probes = [row["val/probe/dice"] for row in facts.history if "val/probe/dice" in row]
    if probes:
        probe = "Label probe (ridge regression from frozen features): Dice"
        lines += ["", f"{probe} {probes[0]:.3f} before training, {probes[-1]:.3f} now."]
    return lines
