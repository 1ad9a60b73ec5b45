"""`mim_plan`: finetuning plans."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from nnunet_mim.checkpoint.format import PretrainedCheckpoint
from nnunet_mim.config import ENCODERS, PRESETS
from nnunet_mim.errors import MiMError, exit_code
from nnunet_mim.nnunet.datasets import dataset_name, required_folder
from nnunet_mim.nnunet.orientation import MIRRORING_IS_OFF, REORIENTING, mirroring_is_unsafe
from nnunet_mim.preparation.mim_plans import check_can_write, make_mim_plans, write_plans
from nnunet_mim.settings import parse_settings
from nnunet_mim.trainers.finetune_config import FinetuneConfig

DESCRIPTION = """\
Writes nnU-Net plans for pretraining and finetuning with MiM: nnUNet_preprocessed/DATASET/nnUNetMiMPlans.json.

They take the dataset's own nnU-Net plans (-p) and change: the network (HybridUNet, of --preset, or of the checkpoint
given with -pc), the patch size (multiples of the network's token, at most 16 voxels an axis), the CT window (-1000…1000
HU instead of the foreground's percentiles; with -pc the window of pretraining), and add a block mim_finetune with every
number of the finetuning recipe. With -pc the spacing of pretraining is used if it is within a factor of 1.5 of the
dataset's own."""

EXAMPLES = """\
examples:
  mim_plan -d 501 --preset small                    plans to pretrain and finetune with
  mim_plan -d 501 -pc checkpoint_final.pth          plans to finetune an existing checkpoint with
  mim_plan -d 501 -p nnUNetResEncUNetLPlans --encoder resenc -o nnUNetMiMResEncPlans     for stock nnU-Net
  mim_plan -d 501 --set num_epochs=100 lr=0.0005 patch_size=64,64,64

settings for --set: patch_size, spacing (mm), batch_size, ct_window (HU), and the recipe:
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after printing a one-line error."""
    options = _parser().parse_args(argv)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Plan one dataset as the command line says."""
    settings = parse_settings(options.set)
    dataset = Path(required_folder("nnUNet_preprocessed"), dataset_name(options.d))
    if "__" in options.o or not options.o.replace("_", "").isalnum() or options.o == options.p:
        raise MiMError(f"-o {options.o}: choose a name of letters, digits and single underscores, other than -p")
    number = dataset.name[7:10]
    command = f"nnUNetv2_plan_and_preprocess -d {number} --no_pp"
    if not (dataset / f"{options.p}.json").is_file() and (dataset / "mim_prepare").is_dir():
        again = f"change its plans with mim_prepare -d {number} -s SPACING --set KEY=VALUE, or "
        remedy = f"{'' if options.pc else again}run `{command}` first"
        raise MiMError(f"{dataset.name} was prepared by mim_prepare and has no {options.p}: {remedy}")
    base_plans = _load(dataset / f"{options.p}.json", command)
    fingerprint = _load(dataset / "dataset_fingerprint.json", command)
    if options.encoder == "resenc" and (options.pc or options.preset):
        raise MiMError("--encoder resenc keeps the network of the base plans: leave out -pc and --preset")
    checkpoint = PretrainedCheckpoint.load(options.pc) if options.pc else None
    if checkpoint is not None and options.preset and PRESETS[options.preset] != checkpoint.network:
        raise MiMError(f"--preset {options.preset} is not the network of {options.pc}: leave --preset out")

    dataset_json = _load(dataset / "dataset.json", command)
    pretrained_with = checkpoint.provenance.get("image_reader_writer") if checkpoint is not None else None
    turned = not {base_plans.get("image_reader_writer"), pretrained_with}.isdisjoint(REORIENTING.values())
    raw = Path(os.environ.get("nnUNet_raw", ""), dataset.name)
    unsafe = options.encoder == "hybrid" and not turned and "mirror_axes" not in settings
    unsafe = unsafe and mirroring_is_unsafe(raw, dataset_json)
    if unsafe:
        settings["mirror_axes"] = []

    plans, notes = make_mim_plans(
        base_plans, fingerprint, dataset_json, options.o, options.c, options.preset or "base", checkpoint, settings,
        options.encoder,
    )  # fmt: skip
    if unsafe:
        notes.append(MIRRORING_IS_OFF)
    plans_file = dataset / f"{options.o}.json"
    preprocessed = check_can_write(plans, plans_file, options.overwrite)
    write_plans(plans, plans_file)
    size = checkpoint.preset if checkpoint is not None else options.preset or "base"
    network = f"HybridUNet {size}" if options.encoder == "hybrid" else f"nnU-Net's own, of {options.p}"
    print(f"wrote {plans_file}\n  network: {network}")
    for note in notes:
        print(f"  {note}")
    print("next:")
    how = f"--encoder {options.encoder}" if options.encoder != "hybrid" else f"--preset {size}"
    for line in next_commands(number, options.o, options.c, how, preprocessed, checkpoint is not None):
        print(f"  {line}")


def next_commands(
    number: str, plans: str, configuration: str, network: str, preprocessed: bool, pretrained: bool
) -> list[str]:
    """What to run after mim_plan."""
    commands = []
    if not preprocessed:
        commands.append(f"nnUNetv2_preprocess -d {number} -plans_name {plans} -c {configuration}")
    if not pretrained:
        commands.append(f"mim_pretrain -d {number} -p {plans} -c {configuration} {network} -f 0")
    how = "-pretrained_weights CHECKPOINT" if "resenc" in network else "-tr nnUNetTrainerMiM"
    commands.append(f"nnUNetv2_train {number} {configuration} 0 {how} -p {plans}")
    return commands


def _load(path: Path, command: str) -> dict[str, Any]:
    if not path.is_file():
        raise MiMError(f"{path} does not exist: run `{command}` first")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise MiMError(f"{path} is not valid JSON ({error}): run `{command}` again") from error


def _recipe() -> str:
    return "\n".join(f"  {f.name} ({f.default})" for f in fields(FinetuneConfig))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mim_plan", description=DESCRIPTION, epilog=EXAMPLES + _recipe(),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset number or name")
    parser.add_argument("-pc", metavar="CHECKPOINT",
                        help="checkpoint_final.pth of a mim_pretrain run, a folder of mim_export, or the name of a "
                        "repository on Hugging Face")  # fmt: skip
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="base plans (default: nnUNetPlans)")
    parser.add_argument("-o", "-overwrite_plans_name", dest="o", default="nnUNetMiMPlans", metavar="NAME",
                        help="name of the new plans (default: nnUNetMiMPlans)")  # fmt: skip
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION",
                        help="the configuration to keep (default: 3d_fullres)")  # fmt: skip
    parser.add_argument("--preset", choices=list(PRESETS),
                        help="network size (default: base, or that of the checkpoint)")  # fmt: skip
    parser.add_argument("--encoder", choices=ENCODERS, default="hybrid",
                        help="hybrid, for nnUNetTrainerMiM, or resenc: keep the residual encoder U-Net of -p, for "
                        "mim_pretrain --encoder resenc and stock nnU-Net (default: hybrid)")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change a setting, see below")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true",
                        help="replace plans even if data was preprocessed with another spacing or window")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
