"""The command line of the few-shot protocol."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_mim.benchmarking.cell import Arm, Length, finished, recipe_of, run_cell
from nnunet_mim.benchmarking.protocol import Place, Protocol, cell_folder, describe, mean_dice
from nnunet_mim.errors import MiMError, exit_code
from nnunet_mim.lock import alone
from nnunet_mim.settings import parse_settings
from nnunet_mim.shared import locate

KNOWN_ARMS = {
    "MiM": ("nnUNetTrainerMiM", None),
    "Scratch": ("nnUNetTrainerMiMScratch", None),
    "nnUNet": ("nnUNetTrainer", "nnUNetPlans"),
    "ResEncL": ("nnUNetTrainer", "nnUNetResEncUNetLPlans"),
}
"""trainer and plans; None: those of -p"""

DESCRIPTION = """\
Train on few and on all labels, with pretraining and without, and compare.

  python -m nnunet_mim.benchmarking.few_shot -d 501 -p nnUNetMiMPlans --labels 5 10 20 all --seeds 3

Every training is nnUNetv2_train on the training cases of one fold of nnU-Net's own split, or a subset of them, and is
validated on all validation cases of the fold. Subsets are nested, and the same for all arms; of a seed, so are the
initial weights where two arms have the same network. Repeating the command goes on where it was interrupted; more
labels, seeds or arms may be added later. The same command may run several times at once, on one device each
(CUDA_VISIBLE_DEVICES): each takes what no other one is at work on.

Arms: MiM, Scratch (the same network, plans and recipe from random weights), nnUNet, ResEncL (stock trainer with plans
nnUNetPlans, nnUNetResEncUNetLPlans), or NAME=TRAINER:PLANS[:CHECKPOINT]; trainers of nnU-Net take the checkpoint with
-pretrained_weights. The first arm without a checkpoint is the control."""

EPILOG = """\
Output: table.md, table.csv (every case, label and metric) and figure.png in the folder of -o, by default
nnUNet_results/DatasetXXX_Name/few_shot__PLANS__CONFIGURATION."""


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after printing a one-line error."""
    options = _parser().parse_args(argv)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Check everything, then train what has not been trained yet, then report."""
    from nnunet_mim.benchmarking.few_shot_report import write_report
    from nnunet_mim.machine import usable_cores
    from nnunet_mim.pretraining.sources import require_environment

    require_environment()
    protocol = build_protocol(options)
    first = protocol.arms[0].source
    output = Path(options.o) if options.o else Path(os.environ["nnUNet_results"], first.dataset) / (
        f"few_shot__{options.p}__{options.c}"
    )  # fmt: skip
    cells = protocol.cells()
    results = {place: finished(cell, cell_folder(output, place)) for place, cell in cells.items()}
    todo = [place for place, result in results.items() if result is None]
    print(f"{len(cells)} trainings of {protocol.length.epochs * protocol.length.iterations} iterations, ", end="")
    print(f"{len(todo)} to do; output {output}", flush=True)
    threads = max(1, usable_cores() // options.jobs) if options.jobs > 1 else 0

    def do(place: Place) -> None:
        folder = cell_folder(output, place)
        try:
            with alone(folder / ".lock", "another process is at work on it"):
                results[place] = result = run_cell(cells[place], folder, options.device, threads)
        except Exception as error:  # one training must not end the others
            kind = "" if isinstance(error, MiMError) else f"{type(error).__name__}: "
            print(f"{describe(place)}: {kind}{error}", flush=True)
            return
        print(f"{describe(place)}: mean Dice {mean_dice(result):.3f}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(do, [] if options.report else todo))
    done = {place: result for place, result in results.items() if result is not None}
    if not done:
        raise MiMError(f"no training in {output} is finished, so there is nothing to report")
    print(write_report(protocol, done, output))
    left = [describe(place) for place in todo if results[place] is None]
    if left and not options.report:
        raise MiMError(f"{len(left)} trainings are not finished, {left[0]} first: see above, and repeat the command")


def build_protocol(options: argparse.Namespace) -> Protocol:
    """From the command line; everything that can be wrong is found here."""
    from nnunet_mim.pretraining.sources import fold_cases

    counts = ("jobs", "seeds", "iterations", "iterations_per_epoch", "val_iterations")
    if bad := [name for name in counts if getattr(options, name) < 1]:
        raise MiMError(f"--{bad[0]} must be at least 1")
    if options.iterations % options.iterations_per_epoch:
        raise MiMError("--iterations must be a multiple of --iterations_per_epoch")
    arms = tuple(_arm(text, options) for text in options.arms)
    if len({arm.name for arm in arms}) < len(arms):
        raise MiMError("--arms: every arm needs a name of its own")
    source = arms[0].source
    if options.fold < 0:
        raise MiMError("--fold must be 0 or more")
    train_cases, val_cases = fold_cases(source, options.fold)
    if not val_cases or not train_cases:
        raise MiMError(f"{source.dataset} has no labels, or fold {options.fold} of its split has no cases on one side")
    for arm in arms:
        if missing := set(train_cases + val_cases) - set(arm.source.cases):
            raise MiMError(f"{min(missing)} is not preprocessed for {arm.source.plans_name}: run nnUNetv2_preprocess")
    length = Length(
        options.iterations // options.iterations_per_epoch, options.iterations_per_epoch, options.val_iterations
    )
    settings = settings_by_arm(parse_settings(options.set), arms)
    for arm in arms:
        if arm.is_mim:
            recipe_of(arm, length, settings[arm.name])
    labels = sorted({_label_count(text, len(train_cases)) for text in options.labels})
    return Protocol(
        arms, options.fold, tuple(labels), options.seeds, length, settings, tuple(sorted(train_cases)), val_cases
    )


def settings_by_arm(given: dict[str, Any], arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Settings of every MiM arm by its name: `key` counts for all of them, `ARM.key` for one."""
    names = [arm.name for arm in arms if arm.is_mim]
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    lengths = {"num_epochs", "iterations_per_epoch", "val_iterations_per_epoch"}
    if bad := [key for key in given if key.split(".")[-1] in lengths]:
        raise MiMError(f"--set {bad[0]}: the length is that of --iterations, --iterations_per_epoch, --val_iterations")
    for key, value in sorted(given.items(), key=lambda item: "." in item[0]):
        arm, dot, own = key.partition(".")
        if dot and arm not in names:
            raise MiMError(f"--set {key}: no MiM arm {arm} (there are {', '.join(names) or 'none'})")
        for name in [arm] if dot else names:
            settings[name][own if dot else key] = value
    return settings


def _label_count(text: str, available: int) -> int:
    if text == "all":
        return available
    if not text.isdigit() or not 1 <= int(text) <= available:
        raise MiMError(f"--labels {text}: give numbers from 1 to {available} (the training cases of the fold), or all")
    return int(text)


def _arm(text: str, options: argparse.Namespace) -> Arm:
    from nnunet_mim.pretraining.sources import find_source
    from nnunet_mim.trainers.checkpoint import find_checkpoint, no_checkpoint_error, read_checkpoint
    from nnunet_mim.trainers.resolve_plans import configuration_of
    from nnunet_mim.trainers.transfer import check_architecture

    name, equals, rest = text.partition("=")
    trainer, plans, checkpoint = ([*rest.split(":", 2), None, None][:3]) if equals else (None, None, None)
    if not equals and name in KNOWN_ARMS:
        trainer, plans = KNOWN_ARMS[name]
    if not trainer or not name.replace("_", "").isalnum():
        raise MiMError(f"--arms {text}: give {', '.join(KNOWN_ARMS)}, or NAME=TRAINER:PLANS[:CHECKPOINT]")
    source = find_source(options.d, plans or options.p, options.c)
    arm = Arm(name, trainer, source)
    if arm.is_mim:
        check_network(arm)
    if arm.is_control and checkpoint:
        raise MiMError(f"--arms {text}: {trainer} starts from random weights: leave the checkpoint out")
    if not arm.is_mim or arm.is_control:
        path = locate(checkpoint) if checkpoint else None
        if path is not None and path.is_dir():
            raise MiMError(f"--arms {text}: {trainer} takes a .pth file, not a folder")
        return replace(arm, checkpoint=str(path) if path else None)
    if checkpoint is None:
        where = (source.plans, source.configuration, options.fold, os.environ["nnUNet_results"])
        found = find_checkpoint(*where)
        if found is None:
            raise no_checkpoint_error(*where)
        checkpoint = str(found)
    stored = read_checkpoint(checkpoint)
    architecture = configuration_of(source.plans, source.configuration)["architecture"]
    check_architecture(stored, architecture["arch_kwargs"], source.in_channels)
    return replace(arm, checkpoint=stored.path)


def check_network(arm: Arm) -> None:
    """Raise MiMError unless the plans name the network: otherwise it would follow from the checkpoint, and the control
    have another one.
    """
    from nnunet_mim.trainers.resolve_plans import configuration_of, uses_hybrid_unet

    source = arm.source
    if not uses_hybrid_unet(configuration_of(source.plans, source.configuration)):
        raise MiMError(
            f"plans {source.plans_name} name another network than that of {arm.trainer}: write plans with mim_plan -d "
            f"{source.dataset[7:10]} -pc CHECKPOINT, and give their name with -p"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m nnunet_mim.benchmarking.few_shot", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("-d", required=True, metavar="DATASET", help="number or name")
    add("-p", default="nnUNetMiMPlans", metavar="PLANS", help="plans of the MiM arms (default: nnUNetMiMPlans)")
    add("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: 3d_fullres")
    add("--fold", type=int, default=0, help="of nnU-Net's split (default: 0)")
    add("--labels", nargs="+", default=["5", "10", "20", "all"], metavar="N",
        help="numbers of training cases, or all (default: 5 10 20 all)")  # fmt: skip
    add("--seeds", type=int, default=3, metavar="N", help="trainings of each (default: 3)")
    add("--arms", nargs="+", default=["MiM", "Scratch"], metavar="ARM", help="see above (default: MiM Scratch)")
    add("--iterations", type=int, default=25_000, metavar="N", help="of every training (default: 25000)")
    add("--iterations_per_epoch", type=int, default=250, metavar="N", help="default: 250")
    add("--val_iterations", type=int, default=25, metavar="N",
        help="patches for the learning curve after every epoch (default: 25)")  # fmt: skip
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="the recipe of the MiM arms, as for mim_plan; ARM.KEY=VALUE for one arm")  # fmt: skip
    add("-device", choices=["cuda", "cpu", "mps"], default="cuda", help="default: cuda")
    add("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default: 1)")
    add("-o", metavar="FOLDER", help="output folder")
    add("--report", action="store_true", help="train nothing, report what is there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
