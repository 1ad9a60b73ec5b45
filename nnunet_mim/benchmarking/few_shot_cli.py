"""The command line of the few-shot protocol: an experiment on one dataset and fold, without a file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_mim.errors import MiMError, exit_code
from nnunet_mim.settings import parse_settings

if TYPE_CHECKING:
    from nnunet_mim.benchmarking.arms import ArmSpec
    from nnunet_mim.benchmarking.matrix import Bench

DESCRIPTION = """\
Train on few and on all labels, with pretraining and without, and compare.

  python -m nnunet_mim.benchmarking.few_shot -d 501 -p nnUNetMiMPlans --labels 5 10 20 all --seeds 3

Every training is nnUNetv2_train on the training cases of one fold of nnU-Net's own split, or a subset of them, and is
validated on all validation cases of the fold. Subsets are nested, and the same for all arms; of a seed, so are the
initial weights where two arms have the same network. Repeating the command goes on where it was interrupted; more
labels, seeds or arms may be added later; what failed is tried again. The same command may run several times at once, on
one device each (CUDA_VISIBLE_DEVICES): each takes what no other one is at work on.

Arms: MiM, Scratch (the same network, plans and recipe from random weights), nnUNet, ResEncL (stock trainer with plans
nnUNetPlans, nnUNetResEncUNetLPlans), or NAME=TRAINER:PLANS[:CHECKPOINT]; trainers of nnU-Net take the checkpoint with
-pretrained_weights. The control is the first nnUNetTrainerMiMScratch, else the first arm without a checkpoint."""

EPILOG = """\
Output: report.html, table.md, table.tex, table.csv (every case, label and metric) and a figure in the folder of -o, by
default nnUNet_results/DatasetXXX_Name/few_shot__PLANS__CONFIGURATION__fold_FOLD. For several datasets, folds or GPUs:
mim_benchmark run."""


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after printing a one-line error."""
    options = _parser().parse_args(argv)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Check everything, then train what has not been trained yet, then report."""
    from nnunet_mim.benchmarking.experiment import plan_experiment, report_experiment, run_experiment
    from nnunet_mim.nnunet.datasets import require_environment

    require_environment()
    bench = build_bench(options)
    if options.report:
        report_experiment(bench)
    elif options.dry_run:
        plan_experiment(bench)
    else:
        run_experiment(bench, retry=True)


def build_bench(options: argparse.Namespace) -> Bench:
    """From the command line."""
    from nnunet_mim.benchmarking.bench_file import length_of
    from nnunet_mim.benchmarking.matrix import Bench, DatasetSpec
    from nnunet_mim.nnunet.datasets import dataset_name

    counts = ("jobs", "seeds", "iterations", "iterations_per_epoch", "val_iterations")
    if bad := [name for name in counts if getattr(options, name) < 1]:
        raise MiMError(f"--{bad[0]} must be at least 1")
    if options.fold < 0:
        raise MiMError("--fold must be 0 or more")
    dataset = dataset_name(options.d)
    output = Path(options.o).resolve() if options.o else Path(os.environ["nnUNet_results"], dataset) / (
        f"few_shot__{options.p}__{options.c}__fold_{options.fold}"
    )  # fmt: skip
    arms = tuple(parse_arm(text, options.p) for text in options.arms or default_arms(dataset, options.c))
    settings = settings_by_arm(parse_settings(options.set), arms)
    return Bench(
        datasets=(DatasetSpec(dataset, (options.fold,), options.c),),
        arms=tuple(replace(arm, settings=settings.get(arm.name, {})) for arm in arms),
        labels=tuple(dict.fromkeys(options.labels)),
        seeds=options.seeds,
        length=length_of(options.iterations, options.iterations_per_epoch, options.val_iterations),
        output=output,
        device=options.device,
        jobs=options.jobs,
        allow_seen=options.allow_seen,
    )


def default_arms(dataset: str, configuration: str) -> list[str]:
    """MiM, its control, and stock nnU-Net where its plans have been preprocessed."""
    folder = Path(os.environ["nnUNet_preprocessed"], dataset)
    if (folder / "nnUNetPlans.json").is_file() and (folder / f"nnUNetPlans_{configuration}").is_dir():
        return ["MiM", "Scratch", "nnUNet"]
    print(f"no stock arm: nnUNetPlans of {dataset} have not been preprocessed (nnUNetv2_plan_and_preprocess)")
    return ["MiM", "Scratch"]


def parse_arm(text: str, plans: str) -> ArmSpec:
    """A name that is enough, or NAME=TRAINER:PLANS[:CHECKPOINT]."""
    from nnunet_mim.benchmarking.arms import KNOWN_ARMS, ArmSpec, known_arm

    name, equals, rest = text.partition("=")
    if not equals and (known := known_arm(name, plans)) is not None:
        return known
    trainer, its_plans, checkpoint = [*rest.split(":", 2), "", "", ""][:3]
    if not trainer or not name:
        raise MiMError(f"--arms {text}: give {', '.join(KNOWN_ARMS)}, or NAME=TRAINER:PLANS[:CHECKPOINT]")
    return ArmSpec(name, trainer, its_plans or plans, checkpoint or None)


def settings_by_arm(given: dict[str, Any], arms: Sequence[ArmSpec]) -> dict[str, dict[str, Any]]:
    """Settings of every MiM arm by its name: `key` counts for all of them, `ARM.key` for one."""
    from nnunet_mim.benchmarking.bench_file import check_settings

    names = [arm.name for arm in arms if arm.trainer.startswith("nnUNetTrainerMiM")]
    if given and not names:
        raise MiMError(f"--set {next(iter(given))}: no arm has a MiM recipe (trainers nnUNetTrainerMiM…): leave it out")
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in sorted(given.items(), key=lambda item: "." in item[0]):
        arm, dot, own = key.partition(".")
        if dot and arm not in names:
            raise MiMError(f"--set {key}: no MiM arm {arm} (there are {', '.join(names) or 'none'})")
        check_settings({own if dot else key: value}, "--set")
        for name in [arm] if dot else names:
            settings[name][own if dot else key] = value
    return settings


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
        help="numbers or percentages of training cases, or all (default: 5 10 20 all)")  # fmt: skip
    add("--seeds", type=int, default=3, metavar="N", help="trainings of each (default: 3)")
    add("--arms", nargs="+", metavar="ARM",
        help="see above (default: MiM Scratch, and nnUNet where nnUNetPlans have been preprocessed)")  # fmt: skip
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
    add("--dry-run", dest="dry_run", action="store_true", help="train nothing, list the trainings and their hours")
    add("--allow-seen", dest="allow_seen", action="store_true",
        help="validate on cases that a pretraining has seen; they are marked in every table")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
