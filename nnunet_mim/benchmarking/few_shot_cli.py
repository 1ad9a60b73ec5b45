"""The command line of the few-shot protocol."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nnunet_mim.benchmarking.cell import Arm, Length, finished, recipe_of, run_cell
from nnunet_mim.benchmarking.protocol import Protocol, cell_folder, describe, mean_dice
from nnunet_mim.errors import MiMError, exit_code
from nnunet_mim.settings import parse_settings

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
labels, seeds or arms may be added later.

Arms: MiM, Scratch (the same network, plans and recipe from random weights), nnUNet, ResEncL (stock trainer with plans
nnUNetPlans, nnUNetResEncUNetLPlans), or NAME=TRAINER:PLANS[:CHECKPOINT]. The first one without a checkpoint is the
control."""

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

    def do(place: tuple[int, int, str]) -> None:
        folder = cell_folder(output, place)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            results[place] = result = run_cell(cells[place], folder, options.device, threads)
        except MiMError as error:
            print(f"{describe(place)}: {error}", flush=True)
            return
        print(f"{describe(place)}: mean Dice {mean_dice(result):.3f}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(do, [] if options.report else todo))
    done = {place: result for place, result in results.items() if result is not None}
    if done:
        print(write_report(protocol, done, output))
    failed = [describe(place) for place in todo if results[place] is None]
    if failed and not options.report:
        raise MiMError(f"{len(failed)} trainings failed, {failed[0]} first: see above, and repeat the command")


def build_protocol(options: argparse.Namespace) -> Protocol:
    """From the command line; everything that can be wrong is found here."""
    from nnunet_mim.pretraining.sources import fold_validation_cases

    if options.jobs < 1 or options.seeds < 1 or options.iterations < options.iterations_per_epoch:
        raise MiMError("--jobs and --seeds must be at least 1, --iterations at least --iterations_per_epoch")
    arms = tuple(_arm(text, options) for text in options.arms)
    if len({arm.name for arm in arms}) < len(arms):
        raise MiMError("--arms: every arm needs a name of its own")
    source = arms[0].source
    val_cases = fold_validation_cases(source, options.fold)
    if not val_cases:
        raise MiMError(f"{source.dataset} has no labels, or fold {options.fold} no validation cases")
    for arm in arms:
        if missing := set(source.cases) - set(arm.source.cases):
            raise MiMError(f"{min(missing)} is not preprocessed for {arm.source.plans_name}: run nnUNetv2_preprocess")
    train_cases = tuple(case for case in source.cases if case not in val_cases)
    length = Length(
        options.iterations // options.iterations_per_epoch, options.iterations_per_epoch, options.val_iterations
    )
    settings = settings_by_arm(parse_settings(options.set), arms)
    for arm in arms:
        if arm.is_mim:
            recipe_of(arm, length, settings[arm.name])
    labels = sorted({_label_count(text, len(train_cases)) for text in options.labels})
    return Protocol(arms, options.fold, tuple(labels), options.seeds, length, settings, train_cases, val_cases)


def settings_by_arm(given: dict[str, Any], arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Settings of every MiM arm by its name: `key` counts for all of them, `ARM.key` for one."""
    names = [arm.name for arm in arms if arm.is_mim]
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
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

    name, equals, rest = text.partition("=")
    trainer, plans, checkpoint = ([*rest.split(":", 2), None, None][:3]) if equals else (None, None, None)
    if not equals and name in KNOWN_ARMS:
        trainer, plans = KNOWN_ARMS[name]
    if not trainer or not name.replace("_", "").isalnum():
        raise MiMError(f"--arms {text}: give {', '.join(KNOWN_ARMS)}, or NAME=TRAINER:PLANS[:CHECKPOINT]")
    source = find_source(options.d, plans or options.p, options.c)
    if trainer != "nnUNetTrainerMiM":
        return Arm(name, trainer, source)
    if checkpoint is None:
        where = (source.plans, source.configuration, options.fold, os.environ["nnUNet_results"])
        found = find_checkpoint(*where)
        if found is None:
            raise no_checkpoint_error(*where)
        checkpoint = str(found)
    return Arm(name, trainer, source, read_checkpoint(checkpoint).path)


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
