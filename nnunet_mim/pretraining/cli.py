"""`mim_pretrain`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from nnunet_mim.config import ALIGNMENTS, DEFAULT_LEARNING_RATE, LADDERS, PRESETS, PretrainConfig, Size3
from nnunet_mim.errors import MiMError

DEFAULT_VIEWS_PER_PASS = {"cpu": 4}
"""per device, else 32: all views of the last level of two crops"""

DESCRIPTION = """\
Pretrain the MiM encoder (Mask in Mask, arXiv 2404.15580) on CT that nnU-Net has preprocessed. No labels are used.

  mim_pretrain -d 501                            stock nnUNetPlans, base network, 3d_fullres
  mim_pretrain -d 501 -p nnUNetMiMPlans -f 0     leave fold 0's validation cases out, for an honest comparison
  mim_pretrain -d 501 502 800 -p nnUNetMiMPlans  several datasets with the same spacing and intensity window
  mim_pretrain -d 501 --c                        continue an interrupted run (give the same settings again)
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
        help="dataset numbers or names; output goes to the first one's",
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
    add("-o", default=None, metavar="TAG", help="tag in the output folder's name, to keep several runs")
    add("--c", action="store_true", dest="resume", help="continue from the latest checkpoint")

    views = parser.add_argument_group("network and views")
    add = views.add_argument
    add(
        "--preset",
        choices=list(PRESETS),
        default=default.preset,
        help="size of the network (default: %(default)s, as published)",
    )
    add(
        "--view",
        nargs="+",
        type=int,
        default=None,
        metavar="V",
        help="voxels per axis that the encoder sees, one number or three, multiples of 32 (default: 96, less where the "
        "cases are smaller)",
    )
    add(
        "--ladder",
        choices=LADDERS,
        default=default.ladder,
        help="fields of view of the levels: published = 2V, V, one token; native = 4V, 2V, V (default: %(default)s)",
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
        default=default.n_children,
        metavar="N",
        help="views cut from each view of level 1 and of level 2 (default: 4 4, which makes 21 views a crop)",
    )
    add(
        "--mask_ratios",
        nargs=3,
        type=float,
        default=default.mask_ratios,
        metavar="R",
        help="masked share per level (default: 0.5 0.6 0.5)",
    )
    add("--alignment", choices=ALIGNMENTS, default=default.alignment, help="between levels (default: %(default)s)")

    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add(
        "--iterations", type=int, default=default.iterations, metavar="N", help="optimiser steps (default: %(default)s)"
    )
    add("--batch", type=int, default=default.batch_size, metavar="N", help="crops a step (default: %(default)s)")
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
        default=default.mirror_axes,
        metavar="A",
        help="array axes (0 1 2) of random mirroring (default: none; leave out the left-right axis, which is 2 unless "
        "the plans' transpose_forward moved it)",
    )
    add("--seed", type=int, default=default.seed, help="of weights, crops and masks (default: %(default)s)")

    add(
        "--init",
        default="",
        metavar="CHECKPOINT",
        help="start from the weights of an earlier run, to go on with a new schedule or on other data",
    )

    running = parser.add_argument_group("running")
    add = running.add_argument
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
        help="processes that read crops (default: 1 on a CPU, else up to 12; 0 reads in the main process)",
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
        help="torch.compile the network; takes a minute or more at the start (default: off)",
    )
    add(
        "--val_every",
        type=int,
        default=default.val_every,
        metavar="N",
        help="iterations between measurements on held-out cases (default: %(default)s)",
    )
    add(
        "--save_every",
        type=int,
        default=default.save_every,
        metavar="N",
        help="iterations between checkpoints (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, or 2 after a one-line error."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except MiMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Check everything, then train. Heavy imports come after the command line is read, so that --help is quick."""
    import torch
    from lightning_fabric import Fabric

    from nnunet_mim.geometry import levels_of, views_per_crop
    from nnunet_mim.pretraining import run as runs
    from nnunet_mim.pretraining.checkpoint import FINAL
    from nnunet_mim.pretraining.loop import RunOptions, pretrain
    from nnunet_mim.pretraining.sources import (
        find_source,
        fold_validation_cases,
        require_environment,
        require_same_units,
        window_warning,
    )

    require_environment()
    fold = "all" if args.f == "all" else _fold(args.f)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise MiMError("no CUDA device found: add -device cpu (slow; try --preset tiny --view 64)")
    if args.compile and args.device == "cpu":
        raise MiMError("--compile is for a GPU: on a CPU the step has a faster convolution of its own without it")
    workers = default_workers(args.device) if args.workers is None else args.workers
    views_per_pass = DEFAULT_VIEWS_PER_PASS.get(args.device, 32) if args.views_per_pass is None else args.views_per_pass
    options = RunOptions(workers, views_per_pass, tuple(args.recompute), args.compile)
    network = PRESETS[args.preset]
    smallest_view: Size3 = tuple(2 * p for p in network.token_size)  # type: ignore[assignment]
    levels_of(build_config(args, 1, _view(args.view) if args.view else smallest_view, _scale(args) or (2, 2, 2)))

    sources = [find_source(dataset, args.p, args.c) for dataset in args.d]
    require_same_units(sources)
    first = sources[0]
    folder = runs.output_folder(first, fold, args.o)
    if not runs.check_output_folder(folder, args.resume):
        print(f"finished already: {folder / FINAL}")
        return
    if fold != "all":
        for source in sources:
            fold_validation_cases(source, int(fold))  # says now what is wrong with the fold
    stored = runs.resumable_checkpoint(folder) if args.resume else None
    if args.init and not args.resume:
        runs.check_init(args.init, network, first.in_channels, args.alignment)
    for source in sources:
        if warning := window_warning(source):
            print(f"warning: {warning}")

    indexes = runs.index_sources(sources)
    infos = [info for index in indexes for info in index]
    view = _view(args.view) if args.view else runs.default_view(infos, network.token_size)
    scale = _scale(args) or runs.default_scale(infos, args.ladder, view)
    config = build_config(args, first.in_channels, view, scale)
    data = runs.run_data(sources, indexes, fold, config)
    if stored is not None:
        runs.check_same_run(stored, config, data.train)

    precision: Any = args.precision or ("bf16-mixed" if args.device == "cuda" else "32-true")
    fabric = Fabric(accelerator=args.device, devices=1, precision=precision)
    fabric.launch()
    spacing = " x ".join(f"{s:.2f}" for s in first.spacing)
    print(f"{len(data.train)} training and {len(data.val)} held-out cases, spacing {spacing} mm")
    levels = levels_of(config)
    for level, count in zip(levels, views_per_crop(levels), strict=True):
        visible = f"{level.n_visible_tokens} of {level.n_tokens} tokens visible"
        print(f"  {count} views a crop of {level.fov} voxels, seen as {level.view_size}: {visible}")
    print(f"preset {config.preset}, {config.iterations} iterations of {config.batch_size} crops, output {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    figures = pretrain(config, data, folder, fabric, args.resume, options)
    print(summary(figures))
    print(f"wrote {folder / FINAL}")
    next_fold = 0 if fold == "all" else fold
    print(f"next: nnUNetv2_train {first.dataset} {args.c} {next_fold} -tr nnUNetTrainerMiM -p {args.p}")


def build_config(args: argparse.Namespace, in_channels: int, view: Size3, scale: Size3) -> PretrainConfig:
    """Settings of a run. Raises MiMError where they cannot work."""
    return PretrainConfig(
        preset=args.preset,
        network=PRESETS[args.preset],
        in_channels=in_channels,
        view_size=view,
        ladder=args.ladder,
        scale=scale,
        mask_ratios=tuple(args.mask_ratios),
        n_children=tuple(args.children),
        alignment=args.alignment,
        init_checkpoint=os.path.abspath(args.init) if args.init else "",
        iterations=args.iterations,
        batch_size=args.batch,
        learning_rate=DEFAULT_LEARNING_RATE[args.preset] if args.lr is None else args.lr,
        mirror_axes=tuple(args.mirror_axes),
        val_every=args.val_every,
        save_every=args.save_every,
        seed=args.seed,
    )


def default_workers(device: str) -> int:
    """One process on a CPU, where computing takes the cores; up to 12 beside a GPU."""
    return 1 if device == "cpu" else max(1, min(12, (os.cpu_count() or 2) - 1))


def summary(figures: dict[str, float]) -> str:
    """Held-out reconstruction beside the trivial predictors, one line per level."""
    lines = ["held-out reconstruction loss   token mean   in-filling   network"]
    for name in sorted(n for n in figures if n.startswith("val/") and n.endswith("/reconstruction")):
        level = name.split("/")[1]
        mean, infill = figures[f"baseline/{level}/token_mean"], figures[f"baseline/{level}/infill"]
        lines.append(f"  {level:28} {mean:10.3f}   {infill:10.3f}   {figures[name]:7.3f}")
    return "\n".join(lines)


def _view(values: list[int]) -> Size3:
    if len(values) not in (1, 3):
        raise MiMError(f"--view takes one number or three, got {len(values)}")
    return tuple(values * 3 if len(values) == 1 else values)  # type: ignore[return-value]


def _scale(args: argparse.Namespace) -> Any:
    return tuple(args.scale) if args.scale else None


def _fold(text: str) -> int:
    if not text.isdigit():
        raise MiMError(f"-f takes 'all' or a fold number, got '{text}'")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
