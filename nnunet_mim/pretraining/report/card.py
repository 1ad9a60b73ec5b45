"""The model card of a pretraining that is shared."""

from __future__ import annotations

from nnunet_mim.checkpoint.format import CITATIONS
from nnunet_mim.pretraining.report.summary import Facts
from nnunet_mim.reporting.page import markdown_text, yaml_text


def model_card(facts: Facts, licence: str | None, data: str | None) -> str:
    """Text for those who find the folder: what it is, what it was trained on, how good, how to use and to cite it.

    Args:
        facts: of the checkpoint.
        licence: of the weights, an identifier such as cc-by-4.0; None: the card says that it is not stated.
        data: a sentence on the images and their licence; None: the card says that it is not stated.
    """
    provenance = facts.provenance
    cases, datasets = len(provenance["cases"]), len(provenance["datasets"])
    schemes = markdown_text(", ".join(map(str, provenance["normalization"])) or "unknown")
    origin = f"{provenance['iterations']} iterations of {facts.config.batch_size} crops"
    if "converted_from" in provenance:
        origin = markdown_text(f"converted from {provenance['converted_from']}. {provenance.get('note', '')}")
    spacing = " x ".join(f"{s:g}" for s in facts.spacing)
    spacing = f"{spacing} mm (the plans' order of axes)" if spacing else "an unknown spacing"
    stated = markdown_text(data or "not stated")
    terms = markdown_text(licence or "not stated: ask those who made them before you use them")
    lines = [
        "---",
        "library_name: nnunet_mim",
        *([f"license: {yaml_text(licence)}"] if licence else []),
        "tags: [medical, ct, nnu-net, self-supervised-learning, mask-in-mask]",
        "---",
        "",
        f"# MiM-pretrained encoder ({markdown_text(facts.config.preset)})",
        "",
        "Self-supervised pretraining by Mask in Mask on CT, to be finetuned with nnU-Net.",
        "",
        f"- Network: {markdown_text(facts.network_text())}",
        f"- Data: {stated}; {cases} cases of {datasets} dataset(s), resampled to {spacing}",
        f"- Input: {facts.config.in_channels} channel(s), {schemes}",
        f"- Training: {origin}",
        f"- Licence of the weights: {terms}",
        "",
        "## Measured on held-out cases",
        "",
        *_metrics_table(facts),
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


def _metrics_table(facts: Facts) -> list[str]:
    """Last losses beside the trivial predictors, and the label probe, as Markdown."""
    levels = facts.last.reconstructed
    if not levels:
        return ["nothing is known"]
    lines = ["| | token mean | in-filling | network |", "|---|---|---|---|"]
    for level in levels:
        losses = level.guesses.token_mean, level.guesses.infill, level.reconstruction
        cells = " | ".join("" if loss is None else f"{loss:.3f}" for loss in losses)
        lines.append(f"| reconstruction loss, {level.name} | {cells} |")
    if dice := facts.probe_dice():
        probe = "Label probe (ridge regression from frozen features): Dice"
        lines += ["", f"{probe} {dice[0]:.3f} before training, {dice[-1]:.3f} now."]
    return lines
