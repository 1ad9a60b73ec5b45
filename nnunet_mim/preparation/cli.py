"""`mim_plan`: plans to pretrain and finetune with."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from nnunet_mim.checkpoint.format import PretrainedCheckpoint
from nnunet_mim.config import CHECKPOINTS, ENCODERS, PRESETS
from nnunet_mim.errors import MiMError, exit_code, printable_lines
from nnunet_mim.networks.resenc import check_resenc
from nnunet_mim.nnunet.datasets import dataset_name, required_folder
from nnunet_mim.nnunet.documents import read_dataset_json, read_fingerprint, read_plans
from nnunet_mim.nnunet.orientation import MIRRORING_IS_OFF, REORIENTING, mirroring_is_unsafe
from nnunet_mim.nnunet.plans import (
    configuration_of,
    has_no_labels,
    mim_prepare_command,
    preset_of,
    preset_option,
    uses_hybrid_unet,
    zyx_of,
)
from nnunet_mim.nnunet.source import plans_in
from nnunet_mim.preparation.common_plans import write_nnunet_plans
from nnunet_mim.preparation.mim_plans import PlanSettings, check_can_write, make_mim_plans
from nnunet_mim.settings import parse_settings, settings_help
from nnunet_mim.system.cli import OneLineParser
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.machine import usable_cores
from nnunet_mim.trainers.finetune_config import FinetuneConfig

DESCRIPTION = """\
Writes nnU-Net plans for pretraining and finetuning with MiM: nnUNet_preprocessed/DATASET/nnUNetMiMPlans.json.

They are the dataset's own nnU-Net plans (-p), changed in four places:
  network       HybridUNet of --preset, or of the checkpoint given with -pc
  patch size    multiples of the network's token, at most 16 voxels an axis
  CT window     -1000…1000 HU instead of the foreground's percentiles; with -pc that of pretraining
  mim_finetune  a new block with every number of the finetuning recipe
With -pc the spacing of pretraining is used if it is within a factor of 1.5 of the dataset's own.
A dataset without any plans is planned by nnU-Net first."""

EXAMPLES = """\
examples:
  mim_plan -d 501 --preset small                    plans to pretrain and finetune with
  mim_plan -d 501 -pc checkpoint_final.pth          plans to finetune an existing checkpoint with
  mim_plan -d 501 -pc tiny-ct                       or weights that come with the package (mim_inspect --list_weights)
  mim_plan -d 501 -p nnUNetResEncUNetLPlans --encoder resenc -o nnUNetMiMResEncPlans     for stock nnU-Net
  mim_plan -d 501 --set num_epochs=100 lr=0.0005 patch_size=64,64,64

settings for --set, of the plans and of the finetuning recipe:"""


NNUNET_PLANS = "nnUNetPlans"


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after printing a one-line error."""
    options = _parser().parse_args(argv)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    settings = parse_settings(options.set)
    dataset = Path(required_folder("nnUNet_preprocessed"), dataset_name(options.d))
    if "__" in options.o or not options.o.replace("_", "").isalnum() or options.o == options.p:
        raise MiMError(f"-o {options.o}: choose a name of letters, digits and single underscores, other than -p")
    if has_no_labels(dataset):
        raise MiMError(
            f"{dataset.name} has no labels, without which nnU-Net cannot preprocess it: write plans with "
            f"{_with_mim_prepare(dataset, options, settings)}"
        )
    base_plans, fingerprint, dataset_json = _read_plans(dataset, options.p, options.pc)
    hybrid = options.encoder == "hybrid"
    if not hybrid and (options.pc or options.preset):
        raise MiMError("--encoder resenc keeps the network of the base plans: leave out -pc and --preset")
    if not hybrid:
        block = configuration_of(base_plans, options.c).get("architecture", {})
        check_resenc(block, str(dataset / f"{options.p}.json"))
    checkpoint = PretrainedCheckpoint.load(options.pc) if options.pc else None
    if checkpoint is not None and options.preset and PRESETS[options.preset] != checkpoint.network:
        raise MiMError(f"--preset {options.preset} is not the network of {options.pc}: leave --preset out")
    preset = None
    if hybrid:
        preset = options.preset or ("base" if checkpoint else _preset_of_base(base_plans, options))

    reader = base_plans.get("image_reader_writer", "")
    provenance = checkpoint.provenance if checkpoint is not None else {}
    pretraining_turned = provenance.get("image_reader_writer") in REORIENTING.values()
    turned = reader in REORIENTING.values() or (pretraining_turned and reader in REORIENTING)
    raw = Path(os.environ.get("nnUNet_raw", ""), dataset.name)
    unsafe = hybrid and not turned and "mirror_axes" not in settings and mirroring_is_unsafe(raw, dataset_json)
    if unsafe:
        settings["mirror_axes"] = []

    plans, notes = make_mim_plans(
        base_plans, fingerprint, dataset_json, options.o, options.c, preset, checkpoint, settings
    )
    if unsafe:
        notes.append(MIRRORING_IS_OFF)
    if pretraining_turned and not turned:
        notes.append(f"WARNING: images were turned to RAS in pretraining; {reader}, the reader of {options.p}, cannot")
    plans_file = dataset / f"{options.o}.json"
    preprocessed = check_can_write(plans, plans_file, options.overwrite)
    write_atomically(plans_file, json.dumps(plans, indent=4).encode())
    size = preset if checkpoint is None else checkpoint.preset
    network = f"HybridUNet {size}" if hybrid else f"nnU-Net's own, of {options.p}"
    print(printable_lines("\n  ".join([f"wrote {plans_file}", f"network: {network}", *notes])))

    number = dataset.name[7:10]
    print("next:")
    if not preprocessed:
        print(f"  nnUNetv2_preprocess -d {number} -plans_name {options.o} -c {options.c}")
    if checkpoint is None:
        encoder = "" if hybrid else " --encoder resenc"
        print(f"  mim_pretrain -d {number} -p {options.o} -c {options.c} -f 0{encoder}")
    weights = "-tr nnUNetTrainerMiM" if hybrid else "-pretrained_weights CHECKPOINT"
    if not hybrid:
        print("  mim_inspect CHECKPOINT  # of others: nnU-Net runs what is in such a file")
    print(f"  nnUNetv2_train {number} {options.c} 0 {weights} -p {options.o}")


def _preset_of_base(base_plans: dict[str, Any], options: argparse.Namespace) -> str:
    """The preset of base plans that name this package's network, else base. MiMError where it is that of no preset."""
    config = base_plans["configurations"].get(options.c, {})
    preset = preset_of(config)
    if not preset and uses_hybrid_unet(config):
        raise MiMError(
            f"the network of plans {options.p} is that of no preset: choose one with --preset ({', '.join(PRESETS)})"
        )
    return preset or "base"


def _with_mim_prepare(dataset: Path, options: argparse.Namespace, settings: Mapping[str, Any]) -> str:
    """The command of mim_prepare that writes the plans asked for, with the spacing and network of those that exist."""
    found = plans_in(dataset)
    number, values = dataset.name[7:10], [value for value in options.set if not value.startswith("spacing=")]
    preset = f" --preset {options.preset}" if options.preset else ""
    spacing: Sequence[float] = (1.5, 1.5, 1.5)
    name = next((name for name in (options.p, options.o, *found) if name in found), None)
    if name is not None:
        plans = read_plans(dataset / f"{name}.json")
        config = configuration_of(plans, min(plans["configurations"]))
        preset, spacing = preset or preset_option(config), zyx_of(settings.get("spacing", config["spacing"]), plans)
    changes = f" --set {' '.join(map(quote, values))}" if values else ""
    return mim_prepare_command(number, spacing, options.o, f"{preset}{changes}")


def _read_plans(dataset: Path, plans: str, checkpoint: str | None) -> list[dict[str, Any]]:
    """Base plans, fingerprint and dataset.json of a preprocessed folder. `checkpoint` is the value of -pc."""
    number = dataset.name[7:10]
    command = f"nnUNetv2_plan_and_preprocess -d {number} --no_pp"
    planned_by_nnunet = plans == _parser().get_default("p")
    if planned_by_nnunet and not (dataset / f"{plans}.json").is_file() and (dataset / "mim_prepare").is_dir():
        again = f"change its plans with mim_prepare -d {number} -s SPACING --set KEY=VALUE, or "
        remedy = f"{'' if checkpoint else again}run `{command}` first"
        raise MiMError(f"{dataset.name} was prepared by mim_prepare and has no {plans}: {remedy}")
    paths = [dataset / f"{name}.json" for name in (plans, "dataset_fingerprint", "dataset")]
    raw = Path(os.environ.get("nnUNet_raw", ""), dataset.name, "dataset.json")
    if plans == NNUNET_PLANS and not plans_in(dataset) and raw.is_file():
        read_dataset_json(raw)
        print(f"{dataset.name} has no {plans}: nnU-Net plans it first", flush=True)
        write_nnunet_plans(dataset.name, min(8, usable_cores()))
    if not paths[0].is_file() and (found := plans_in(dataset)):
        plan = f", or run `{command}`" if plans == NNUNET_PLANS else ""
        raise MiMError(f"{paths[0]} does not exist: choose base plans with -p ({', '.join(found)}){plan}")
    for path in paths:
        if not path.is_file():
            without = "" if path != paths[0] or plans == NNUNET_PLANS else ", and leave out -p"
            raise MiMError(f"{path} does not exist: run `{command}` first{without}")
    return [read_plans(paths[0]), read_fingerprint(paths[1]), read_dataset_json(paths[2])]


def _parser() -> OneLineParser:
    parser = OneLineParser(
        "mim_plan",
        description=DESCRIPTION,
        epilog="\n".join([EXAMPLES, settings_help(PlanSettings), settings_help(FinetuneConfig)]),
    )
    add = parser.add_argument
    add("-d", required=True, metavar="DATASET", help="dataset number or name")
    add("-pc", metavar="CHECKPOINT", help=f"pretraining: {CHECKPOINTS}")
    add("-p", default=NNUNET_PLANS, metavar="PLANS", help=f"base plans (default: {NNUNET_PLANS})")
    add("-o", "-overwrite_plans_name", dest="o", default="nnUNetMiMPlans", metavar="NAME",
        help="name of the new plans (default: nnUNetMiMPlans)")  # fmt: skip
    add("-c", default="3d_fullres", metavar="CONFIGURATION", help="the configuration to keep (default: 3d_fullres)")
    add("--preset", choices=list(PRESETS),
        help="network size (default: that of the checkpoint, or of base plans for MiM, else base)")  # fmt: skip
    add("--encoder", choices=ENCODERS, default="hybrid",
        help="hybrid, for nnUNetTrainerMiM; or resenc: keep the residual encoder U-Net of -p, for "
        "--encoder resenc of mim_pretrain and stock nnU-Net (default: hybrid)")  # fmt: skip
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change a setting, see below")
    add("--overwrite", action="store_true",
        help="replace plans even if data was preprocessed with another spacing or window")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
