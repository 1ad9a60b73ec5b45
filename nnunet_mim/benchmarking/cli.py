"""`mim_benchmark`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_mim.errors import MiMError, exit_code
from nnunet_mim.system.cli import OneLineParser
from nnunet_mim.system.locks import exclusive_lock
from nnunet_mim.system.machine import usable_cores

if TYPE_CHECKING:
    from nnunet_mim.benchmarking.bench_file import Bench
    from nnunet_mim.benchmarking.classifiers.bench_file import ClassifierBench

DESCRIPTION = """\
Benchmarks on public CT.

  mim_benchmark prepare --msd Task03_Liver Task06_Lung --btcv RawData
  mim_benchmark run bench.yaml --dry-run
  mim_benchmark run bench.yaml
  mim_benchmark few_shot -d 501 -p nnUNetMiMPlans"""

RUN = """\
Train every arm of an experiment on every dataset, fold, number of labels and seed, and compare.

  mim_benchmark run bench.yaml

bench.yaml, for example:

  output: results
  datasets: {501: {folds: [0, 1, 2, 3, 4]}, 502: {folds: [0]}}
  arms: [MiM, Scratch, nnUNet]
  labels: [10%, 100%]
  seeds: 3
  gpus: [0, 1, 2, 3]

With `target: malignant` in the file the arms are classifiers, and every training is mim_classify train:
docs/classification.md.

Every training is nnU-Net's own command in a folder of its own. Repeating the command goes on where it was interrupted,
and does nothing where everything is finished; what failed is named, and tried again with --retry. All entries:
docs/benchmark.md."""

RUN_EPILOG = """\
Output, in the folder of `output` (relative to bench.yaml): report.html, table.md, table.tex, table.csv (every case,
label and metric), and cells/ with every training, its log.txt and its predictions."""

FEW_SHOT = """\
Train on few and on all labels, with pretraining and without, and compare.

  mim_benchmark few_shot -d 501 -p nnUNetMiMPlans --labels 5 10 20 all --seeds 3 --test 504

Every training is nnUNetv2_train on the training cases of one fold of nnU-Net's own split, or a subset of them, and is
validated on all validation cases of the fold. Subsets are nested, and the same for all arms; of a seed, so are the
initial weights where two arms have the same network. Repeating the command goes on where it was interrupted; more
labels, seeds or arms may be added later; what failed is tried again. The same command may run several times at once, on
one device each (CUDA_VISIBLE_DEVICES): each takes what no other one is at work on.

Arms: MiM, Scratch (the same network, plans and recipe from random weights), nnUNet, ResEncL (stock trainer with plans
nnUNetPlans, nnUNetResEncUNetLPlans), or NAME=TRAINER:PLANS[:CHECKPOINT]; trainers of nnU-Net take the checkpoint with
-pretrained_weights. The control is the first nnUNetTrainerMiMScratch, else the first arm without a checkpoint.

The experiment is written to bench.yaml in the output folder, anew every time. For several datasets, folds or GPUs, or
for SLURM, copy and edit that file and give it to mim_benchmark run."""

FEW_SHOT_EPILOG = """\
Output: bench.yaml, report.html, table.md, table.tex, table.csv (every case, label and metric; with --test also
test_DATASET.csv) and a figure in the folder of -o, by default
nnUNet_results/DatasetXXX_Name/few_shot__PLANS__CONFIGURATION__fold_FOLD."""

PREPARE = """\
Make nnU-Net datasets of the extracted archives of the Medical Segmentation Decathlon (its CT tasks: Task03_Liver,
Task06_Lung, Task07_Pancreas, Task08_HepaticVessel, Task09_Spleen, Task10_Colon) and of BTCV (RawData.zip).

  mim_benchmark prepare --msd Task03_Liver Task06_Lung --btcv RawData --splits

Everything is checked before anything is written: number of cases, missing and damaged files, 4-D images, grids of
images and labels, label values. A dataset appears in nnUNet_raw whole or not at all; one that is there already is
kept."""

PREPARE_EPILOG = """\
Output: nnUNet_raw/Dataset003_Liver, Dataset006_Lung, ..., Dataset220_BTCV; with --splits also splits_final.json in
nnUNet_preprocessed/DatasetXXX_Name: nnU-Net's five folds for MSD; for BTCV the published blocks of six as folds 0 to 4,
and the split of 18 and 12 as fold 5."""

FEW_SHOT_ENTRIES = ("seeds", "iterations", "iterations_per_epoch", "val_iterations", "device", "jobs", "allow_seen")
"""Entries of bench.yaml that are options of `few_shot` too."""


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after printing a one-line error."""
    options = _parser().parse_args(argv)
    return exit_code(lambda: options.run(options))


def prepare(options: argparse.Namespace) -> None:
    """Check all archives, then convert those that are not in nnUNet_raw yet."""
    from nnunet_mim.benchmarking.archives import archive_problems, find_btcv, find_msd
    from nnunet_mim.benchmarking.raw_datasets import already_there, check_space, make_dataset
    from nnunet_mim.benchmarking.splits import SPLITS_FILE, btcv_splits, check_splits, nnunet_splits, write_splits
    from nnunet_mim.nnunet.datasets import required_folder
    from nnunet_mim.system.guarded import prepare_workers

    raw = Path(required_folder("nnUNet_raw"))
    preprocessed = Path(required_folder("nnUNet_preprocessed")) if options.splits else None
    if options.np < 1:
        raise MiMError("-np must be at least 1")
    if not options.msd and not options.btcv:
        raise MiMError("nothing to prepare: give folders with --msd or --btcv")
    archives = [find_msd(Path(folder), options.partial) for folder in options.msd]
    archives += [find_btcv(Path(options.btcv), options.btcv_id, options.partial)] if options.btcv else []
    names = [archive.dataset for archive in archives]
    if twice := [name for name in names if names.count(name) > 1]:
        raise MiMError(f"{twice[0]} would be made of two folders: give one of them")
    with ExitStack() as locks:  # all of them before any work
        check_space([], raw)
        for name in names:
            busy = f"another mim_benchmark is at work on {name}: repeat the command when it has ended"
            locks.enter_context(exclusive_lock(raw / f".mim_benchmark_{name}.lock", busy))
        todo = [archive for archive in archives if not already_there(archive, raw)]
        splits = {}
        if preprocessed:
            for archive in archives:
                cases = [case.name for case in archive.cases]
                splits[archive.dataset] = btcv_splits(cases) if archive.is_btcv else nnunet_splits(cases)
                check_splits(preprocessed / archive.dataset / SPLITS_FILE, splits[archive.dataset])
        _refuse([line for archive in todo for line in archive.problems])
        check_space(todo, raw)
        prepare_workers(archive_problems.__module__)
        _refuse([line for archive in todo for line in archive_problems(archive, options.np, options.ignore_origin)])
        for archive in archives:
            if archive in todo:
                make_dataset(archive, raw)
            state = "made" if archive in todo else "there already"
            print(f"{archive.dataset}: {len(archive.cases)} of {archive.published} published training cases, {state}")
            if preprocessed:
                print(f"  splits: {write_splits(preprocessed, archive.dataset, splits[archive.dataset])}")
    print(f"next: mim_prepare -d {' '.join(str(int(name[7:10])) for name in names)}")


def run(options: argparse.Namespace) -> None:
    """Plan, report, or train and report an experiment of a file."""
    from nnunet_mim.benchmarking.bench_file import Bench, read_bench
    from nnunet_mim.benchmarking.classifiers.bench_file import named_as_entries

    bench = read_bench(Path(options.bench))
    if isinstance(bench, Bench):
        _execute(bench, options, options.retry)
    else:
        with named_as_entries():
            _execute_classifiers(bench, options)


def few_shot(options: argparse.Namespace) -> None:
    """Plan, report, or train and report the few-shot protocol."""
    import yaml

    from nnunet_mim.benchmarking.bench_file import arm_entries, bench_of, default_arms
    from nnunet_mim.nnunet.datasets import dataset_name, require_environment
    from nnunet_mim.settings import parse_settings

    require_environment()
    dataset = dataset_name(options.d)
    folder = f"few_shot__{options.p}__{options.c}__fold_{options.fold}"
    output = Path(options.o).resolve() if options.o else Path(os.environ["nnUNet_results"], dataset, folder)
    content = {
        "output": ".",
        "datasets": {dataset: {"folds": [options.fold], "configuration": options.c}},
        "arms": arm_entries(options.arms or default_arms(dataset, options.c), options.p, parse_settings(options.set)),
        "labels": list(dict.fromkeys(options.labels)),
        "test": list(dict.fromkeys(options.test)),
        **{name: getattr(options, name) for name in FEW_SHOT_ENTRIES},
    }
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
    _execute(bench_of(content, output), options, retry=True, bench_yaml=text)


def _execute(bench: Bench, options: argparse.Namespace, retry: bool, bench_yaml: str = "") -> None:
    from nnunet_mim.benchmarking.experiment import plan_experiment, report_experiment, run_experiment

    bench = replace(bench, allow_seen=bench.allow_seen or options.allow_seen)
    if options.dry_run:
        plan_experiment(bench)
    elif options.report:
        report_experiment(bench)
    else:
        run_experiment(bench, retry, bench_yaml)


def _execute_classifiers(bench: ClassifierBench, options: argparse.Namespace) -> None:
    from nnunet_mim.benchmarking.classifiers import experiment

    if options.dry_run:
        experiment.plan_classifiers(bench)
    elif options.report:
        experiment.report_classifiers(bench)
    else:
        experiment.run_classifiers(bench, options.retry)


def _refuse(problems: list[str]) -> None:
    """Raise the only problem, or print twenty of them and raise how many there are."""
    if len(problems) == 1:
        raise MiMError(problems[0])
    for line in problems[:20]:
        print(f"  {line}", file=sys.stderr)
    if problems:
        raise MiMError(f"{len(problems)} problems, nothing was written; the first: {problems[0]}")


def _parser() -> OneLineParser:
    parser = OneLineParser("mim_benchmark", description=DESCRIPTION)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(function: Callable[..., None], summary: str, description: str, epilog: str) -> Any:
        texts: dict[str, Any] = {"help": summary, "description": description, "epilog": epilog}
        made = commands.add_parser(function.__name__, **texts)
        made.set_defaults(run=function)
        return made

    _add_prepare(command(prepare, "nnU-Net datasets of the archives of MSD and BTCV", PREPARE, PREPARE_EPILOG))
    _add_run(command(run, "train and compare the arms of an experiment", RUN, RUN_EPILOG))
    summary = "what pretraining is worth with few labels and with all"
    _add_few_shot(command(few_shot, summary, FEW_SHOT, FEW_SHOT_EPILOG))
    return parser


def _add_modes(command: Any) -> Any:
    """What to do instead of training. Returns the group of these options, of which one may be given."""
    seen = "validate on cases that a pretraining has seen; they are marked in every table (classifiers always do)"
    command.add_argument("--allow-seen", action="store_true", help=seen)
    modes = command.add_mutually_exclusive_group()
    modes.add_argument("--dry-run", action="store_true", help="list the trainings and their hours, train nothing")
    modes.add_argument("--report", action="store_true", help="report what is finished, train nothing")
    return modes


def _add_run(command: Any) -> None:
    command.add_argument("bench", metavar="bench.yaml", help="the experiment")
    _add_modes(command).add_argument("--retry", action="store_true", help="try again what failed")


def _add_prepare(command: Any) -> None:
    add, cores = command.add_argument, min(8, usable_cores())
    add("--msd", nargs="+", action="extend", default=[], metavar="FOLDER", help="extracted, such as Task03_Liver")
    add("--btcv", metavar="FOLDER", help="extracted RawData, with Training/img and Training/label")
    add("--btcv_id", type=int, default=220, metavar="N", help="number of BTCV's dataset (default: 220)")
    add("--partial", action="store_true", help="take the complete cases of an archive that is not complete")
    origin = "let origin and direction of a label differ from its image's; the dataset's labels get the image's"
    add("--ignore_origin", action="store_true", help=origin)
    add("--splits", action="store_true", help="write splits_final.json too; another one is never replaced")
    processes = f"files read at once (default: 8, or the cores it may use; here {cores})"
    add("-np", type=int, default=cores, metavar="N", help=processes)


def _add_few_shot(command: Any) -> None:
    add = command.add_argument
    add("-d", required=True, metavar="DATASET", help="number or name")
    add("-p", default="nnUNetMiMPlans", metavar="PLANS", help="plans of the MiM arms (default: nnUNetMiMPlans)")
    add("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: 3d_fullres")
    add("-f", "--fold", type=int, default=0, metavar="FOLD", help="of nnU-Net's split (default: 0)")
    labels = "numbers or percentages of training cases, or all (default: 5 10 20 all)"
    add("--labels", nargs="+", default=["5", "10", "20", "all"], metavar="N", help=labels)
    add("--seeds", type=int, default=3, metavar="N", help="trainings of each (default: 3)")
    arms = "see above (default: MiM Scratch, and nnUNet where nnUNetPlans have been preprocessed)"
    add("--arms", nargs="+", metavar="ARM", help=arms)
    add("--iterations", type=int, default=25_000, metavar="N", help="of every training (default: 25000)")
    add("--iterations_per_epoch", type=int, default=250, metavar="N", help="default: 250")
    patches = "patches for the learning curve after every epoch (default: 25)"
    add("--val_iterations", type=int, default=25, metavar="N", help=patches)
    recipe = "the recipe of the MiM arms, as for mim_plan; ARM.KEY=VALUE for one arm"
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=recipe)
    add("-device", choices=["cuda", "cpu", "mps"], default="cuda", help="default: cuda")
    test = "datasets in nnUNet_raw, whose labelled cases every trained network predicts and is scored on too"
    add("--test", nargs="+", default=[], metavar="DATASET", help=test)
    add("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default: 1)")
    add("-o", metavar="FOLDER", help="output folder")
    _add_modes(command)


if __name__ == "__main__":
    sys.exit(main())
