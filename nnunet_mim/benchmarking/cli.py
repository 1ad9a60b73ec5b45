"""`mim_benchmark`."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nnunet_mim.errors import MiMError, exit_code
from nnunet_mim.system.locks import exclusive_lock
from nnunet_mim.system.machine import usable_cores

DESCRIPTION = """\
Benchmarks on public CT.

  mim_benchmark prepare --msd Task03_Liver Task06_Lung --btcv RawData
  mim_benchmark run bench.yaml --dry-run
  mim_benchmark run bench.yaml"""

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

Every training is nnU-Net's own command in a folder of its own. Repeating the command goes on where it was interrupted,
and does nothing where everything is finished; what failed is named, and tried again with --retry. All entries:
docs/benchmark.md."""

RUN_EPILOG = """\
Output, in the folder of `output` (relative to bench.yaml): report.html, table.md, table.tex, table.csv (every case,
label and metric), and cells/ with every training, its log.txt and its predictions."""

PREPARE = """\
Make nnU-Net datasets of the folders that come out of the archives of the Medical Segmentation Decathlon (its CT tasks:
Task03_Liver, Task06_Lung, Task07_Pancreas, Task08_HepaticVessel, Task09_Spleen, Task10_Colon) and of BTCV
(RawData.zip).

  mim_benchmark prepare --msd Task03_Liver Task06_Lung --btcv RawData --splits

Everything is checked before anything is written: number of cases, missing and damaged files, 4-D images, grids of
images and labels, label values. A dataset appears in nnUNet_raw whole or not at all; one that is there already is
kept."""

PREPARE_EPILOG = """\
Output: nnUNet_raw/Dataset003_Liver, Dataset006_Lung, ..., Dataset220_BTCV; with --splits also splits_final.json in
nnUNet_preprocessed/DatasetXXX_Name: nnU-Net's five folds for MSD; for BTCV the published blocks of six as folds 0 to 4,
and the split of 18 and 12 as fold 5."""

SHOWN_PROBLEMS = 20


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

    raw = Path(required_folder("nnUNet_raw"))
    preprocessed = Path(required_folder("nnUNet_preprocessed")) if options.splits else None
    if options.np < 1:
        raise MiMError("-np must be at least 1")
    if not options.msd and not options.btcv:
        raise MiMError("nothing to prepare: give folders with --msd or --btcv")
    archives = [find_msd(Path(folder), options.partial) for folder in options.msd]
    if options.btcv:
        archives.append(find_btcv(Path(options.btcv), options.btcv_id, options.partial))
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
        _refuse([line for archive in todo for line in archive_problems(archive, options.np, options.ignore_origin)])
        for archive in archives:
            if archive in todo:
                make_dataset(archive, raw, options.np)
            state = "made" if archive in todo else "there already"
            print(f"{archive.dataset}: {len(archive.cases)} of {archive.published} published training cases, {state}")
            if preprocessed:
                print(f"  splits: {write_splits(preprocessed, archive.dataset, splits[archive.dataset])}")
    print(f"next: mim_prepare -d {' '.join(str(int(name[7:10])) for name in names)}")


def run(options: argparse.Namespace) -> None:
    """Plan, report, or train and report."""
    from dataclasses import replace

    from nnunet_mim.benchmarking.bench_file import read_bench
    from nnunet_mim.benchmarking.experiment import plan_experiment, report_experiment, run_experiment

    bench = read_bench(Path(options.bench))
    bench = replace(bench, allow_seen=bench.allow_seen or options.allow_seen)
    if options.dry_run:
        plan_experiment(bench)
    elif options.report:
        report_experiment(bench)
    else:
        run_experiment(bench, options.retry)


def _refuse(problems: list[str]) -> None:
    """Raise the only problem, or print all of them and raise how many there are."""
    if not problems:
        return
    if len(problems) == 1:
        raise MiMError(problems[0])
    for line in problems[:SHOWN_PROBLEMS]:
        print(f"  {line}", file=sys.stderr)
    raise MiMError(f"{len(problems)} problems, nothing was written; the first: {problems[0]}")


def _parser() -> argparse.ArgumentParser:
    raw_text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "mim_benchmark", description=DESCRIPTION, allow_abbrev=False, formatter_class=raw_text
    )  # fmt: skip
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser(
        "prepare", help="nnU-Net datasets of the archives of MSD and BTCV", description=PREPARE, epilog=PREPARE_EPILOG,
        allow_abbrev=False, formatter_class=raw_text,
    )  # fmt: skip
    command.set_defaults(run=prepare)
    add = command.add_argument
    add("--msd", nargs="+", action="extend", default=[], metavar="FOLDER", help="extracted, such as Task03_Liver")
    add("--btcv", metavar="FOLDER", help="extracted RawData, with Training/img and Training/label")
    add("--btcv_id", type=int, default=220, metavar="N", help="number of BTCV's dataset (default: 220)")
    add("--partial", action="store_true", help="take the complete cases of an archive that is not complete")
    add("--ignore_origin", action="store_true",
        help="let origin and direction of a label differ from its image's, as nnU-Net does")  # fmt: skip
    add("--splits", action="store_true", help="write splits_final.json too; another one is never replaced")
    cores = min(8, usable_cores())
    add("-np", type=int, default=cores, metavar="N",
        help=f"files read or converted at once (default: 8, or the cores it may use; here {cores})")  # fmt: skip
    _add_run(commands)
    return parser


def _add_run(commands: Any) -> None:
    command = commands.add_parser(
        "run", help="train and compare the arms of an experiment", description=RUN, epilog=RUN_EPILOG,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.set_defaults(run=run)
    add = command.add_argument
    add("bench", metavar="bench.yaml", help="the experiment")
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", dest="dry_run", action="store_true", help="list the trainings and their hours, train nothing"
    )
    what.add_argument("--report", action="store_true", help="report what is finished, train nothing")
    what.add_argument("--retry", action="store_true", help="try again what failed")
    add("--allow-seen", dest="allow_seen", action="store_true",
        help="validate on cases that a pretraining has seen; they are marked in every table")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
