"""The command line of `mim_pretrain`. Settings have no default here: they come from PretrainConfig and the data."""

from __future__ import annotations

import argparse
from typing import Any

from nnunet_mim.config import ALIGNMENTS, ENCODERS, LADDERS, PRESETS, PretrainConfig

SETTING_OF_FLAG = {
    "preset": "preset",
    "encoder": "encoder",
    "view": "view_size",
    "ladder": "ladder",
    "scale": "scale",
    "children": "n_children",
    "mask_ratios": "mask_ratios",
    "alignment": "alignment",
    "iterations": "iterations",
    "batch": "batch_size",
    "lr": "learning_rate",
    "mirror_axes": "mirror_axes",
    "seed": "seed",
    "init": "init_checkpoint",
    "val_every": "val_every",
    "save_every": "save_every",
}

DESCRIPTION = """\
Pretrain the MiM encoder (Mask in Mask, arXiv 2404.15580) on CT that nnU-Net has preprocessed. No labels are used.

  mim_pretrain -d 501                            stock nnUNetPlans, base network, 3d_fullres
  mim_pretrain -d 501 -p nnUNetMiMPlans -f 0     leave fold 0's validation cases out, for an honest comparison
  mim_pretrain -d 501 502 800 -p nnUNetMiMPlans  several datasets with the same spacing and intensity window
  mim_pretrain -d 501 --c                        continue an interrupted run, with its own settings
  mim_pretrain -d 501 --dry-run                  measure a few steps: time, memory and disk of the whole run
  mim_pretrain -d 501 --preset tiny --view 64 --iterations 2000 -device cpu     a small run without a GPU

Afterwards: nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerMiM (same -p)."""

EPILOG = """\
Output, in nnUNet_results/DatasetXXX_Name/MiMPretrain[_TAG]__PLANS__CONFIGURATION/fold_X:
  checkpoint_final.pth    what nnUNetTrainerMiM loads;  checkpoint_latest.pth while training, for --c
  train.csv, val.csv      losses per level; tensorboard/ holds the same curves
The val columns are measured on held-out cases; level1 is the widest view. A reconstruction loss below both baselines
(token_mean: predicting each token's mean; infill: copying the nearest visible voxels) shows that something is learned.
Bad input ends with exit code 2 and one line that says what to do."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of mim_pretrain."""
    parser = argparse.ArgumentParser(
        "mim_pretrain",
        allow_abbrev=False,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = PretrainConfig()

    data = parser.add_argument_group("data")
    add = data.add_argument
    add(
        "-d",
        nargs="+",
        required=True,
        metavar="DATASET",
        help="dataset numbers or names; output goes to the first one's, the others point to it",
    )
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans identifier (default: %(default)s)")
    add("-c", default="3d_fullres", metavar="CONFIG", help="configuration of the plans (default: %(default)s)")
    add(
        "-f",
        default="all",
        metavar="FOLD",
        help="leave out this fold's validation cases of labelled datasets and measure on them (default: all, which "
        "trains on every case but a few)",
    )
    add("--strict", action="store_true", help="stop at cases that cannot be used (default: name them and go without)")
    add("-o", default=None, metavar="TAG", help="tag in the output folder's name, to keep several runs")
    add("--c", action="store_true", dest="resume", help="continue from the latest checkpoint")

    views = parser.add_argument_group("network and views")
    add = views.add_argument
    add(
        "--preset",
        choices=list(PRESETS),
        help=f"size of the network (default: {default.preset}, as published)",
    )
    add(
        "--encoder",
        choices=ENCODERS,
        help="hybrid, for nnUNetTrainerMiM, or resenc: nnU-Net's residual encoder U-Net of the plans, to be finetuned "
        f"by stock nnU-Net with -pretrained_weights (default: {default.encoder})",
    )
    add(
        "--view",
        nargs="+",
        type=int,
        default=None,
        metavar="V",
        help="voxels per axis that the encoder sees, one number or three, multiples of 32 (default: by the size of "
        "the cases, at most 96; with --encoder resenc what its strides divide)",
    )
    add(
        "--ladder",
        choices=LADDERS,
        help="fields of view of the levels: published = 2V, V, one token; native = 4V, 2V, V (default: published)",
    )
    add(
        "--scale",
        nargs=3,
        type=int,
        default=None,
        metavar="S",
        help="factor between levels per axis, 2 or 1 (default: 2, or 1 where the cases are too thin)",
    )
    add(
        "--children",
        nargs=2,
        type=int,
        metavar="N",
        help="views cut from each view of level 1 and of level 2 (default: 4 4, which makes 21 views a crop)",
    )
    add(
        "--mask_ratios",
        nargs=3,
        type=float,
        metavar="R",
        help="masked share per level (default: 0.5 0.6 0.5)",
    )
    add("--alignment", choices=ALIGNMENTS, help=f"between levels (default: {default.alignment})")

    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add("--iterations", type=int, metavar="N", help=f"optimiser steps (default: {default.iterations})")
    add("--batch", type=int, metavar="N", help=f"crops a step, over all devices (default: {default.batch_size})")
    add(
        "--lr",
        type=float,
        default=None,
        help="peak learning rate (default: 5e-4 for tiny and small, 2e-4 for base and large)",
    )
    add(
        "--mirror_axes",
        nargs="*",
        type=int,
        metavar="A",
        help="array axes (0 1 2) of random mirroring (default: none; leave out the left-right axis, which is 2 unless "
        "the plans' transpose_forward moved it)",
    )
    add("--seed", type=int, help=f"of weights, crops and masks (default: {default.seed})")

    add(
        "--init",
        metavar="CHECKPOINT",
        help="start from the weights of an earlier run, to go on with a new schedule or on other data",
    )
    add(
        "--config",
        metavar="FILE.yaml",
        help="settings from a file; flags and --set override it. Every run leaves its own in config.yaml",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="any setting (see --list_settings), such as weight_decay=0.1 or network.depths=2,2,2,6",
    )

    running = parser.add_argument_group("running")
    add = running.add_argument
    add(
        "-num_gpus",
        type=int,
        default=None,
        metavar="N",
        help="devices of this machine, the batch is shared among them (default: 1, or what torchrun or SLURM started)",
    )
    add(
        "--shard",
        action="store_true",
        help="spread weights and optimiser state over the devices (FSDP), for networks too large for one; same result",
    )
    add("-device", choices=["cuda", "cpu", "mps"], default="cuda", help="as in nnUNetv2_train (default: %(default)s)")
    add(
        "--precision",
        default=None,
        choices=["32-true", "bf16-mixed"],
        help="default: bf16-mixed on cuda, else 32-true",
    )
    add(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="processes that read crops for each device (default: 1 on a CPU; beside a GPU its share of the cores, at "
        "most 12; 0 reads in the main process)",
    )
    add(
        "--views_per_pass",
        type=int,
        default=None,
        metavar="N",
        help="most views computed at once, which bounds the memory; same result (default: 32, on a CPU 4)",
    )
    add(
        "--recompute",
        type=int,
        nargs="+",
        default=(),
        metavar="LEVEL",
        help="levels (1 2 3) that keep no activations but compute them again: less memory, same result, slower",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile the network; takes minutes at the start (default: off)",
    )
    add(
        "--record",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on one GPU, record a step as a CUDA graph and replay it: same result, much faster where the network is "
        "small for the device; not with --compile, --recompute, --shard (default: on)",
    )
    add(
        "--val_every",
        type=int,
        metavar="N",
        help="iterations between measurements on held-out cases (default: 250)",
    )
    add(
        "--save_every",
        type=int,
        metavar="N",
        help="iterations between checkpoints (default: 250)",
    )
    add(
        "--dry-run",
        action="store_true",
        dest="dry_run",
        help="measure a few real steps and print time, memory and disk of the whole run; nothing is written",
    )
    parser.add_argument(
        "--list_settings", action=ListSettings, nargs=0, help="print every setting with its default, then exit"
    )
    return parser


class ListSettings(argparse.Action):
    """Print all settings and exit, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from nnunet_mim.pretraining.configure import settings_table

        print(settings_table())
        parser.exit()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags have been given for, by their name in PretrainConfig."""
    given = {name: getattr(args, flag) for flag, name in SETTING_OF_FLAG.items()}
    return {name: value for name, value in given.items() if value is not None}
