"""`mim_prepare`."""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import ExitStack
from pathlib import Path

from nnunet_mim.config import PRESETS
from nnunet_mim.errors import MiMError, exit_code, printable_lines
from nnunet_mim.nnunet.datasets import dataset_name, dataset_names, required_folder
from nnunet_mim.settings import parse_settings
from nnunet_mim.system.cli import OneLineParser
from nnunet_mim.system.guarded import prepare_workers
from nnunet_mim.system.locks import exclusive_lock
from nnunet_mim.system.machine import usable_cores

DESCRIPTION = """\
Prepare CT for mim_pretrain, with labels or without.

  mim_prepare -d 800 -n MyCT -i FOLDER [FOLDER...]   any CT in folders: NIfTI, NRRD, MHA/MHD files, DICOM series
  mim_prepare -d 501 502                             datasets in nnUNet_raw, labelled or not, with the same plans

Everything gets one spacing (-s, 1.5 mm), one intensity window (-1000...1000 HU) and one orientation, so that one
pretraining can use all datasets and serve them all: mim_pretrain -d 501 502 800 -p nnUNetMiMPlans.

Images that are no CT volume in Hounsfield units are left out, each with its reason: localisers, MR, label maps, 2-D,
few slices, missing slices, duplicates, damaged files, files that crash or hang what reads them. Repeating the command
goes on where it was interrupted, and adds what is new in the folders.

On a cluster: mim_prepare -d 800 -n MyCT -i FOLDER -np 8 --slurm jobs=16 slurm_partition=cpu timeout_min=240
The command waits for the jobs, and writes the same as without --slurm; Ctrl-C cancels them."""

EPILOG = """\
Output, in nnUNet_preprocessed/DatasetXXX_Name:
  nnUNetMiMPlans.json, nnUNetMiMPlans_3d_fullres/   plans and preprocessed cases, as nnU-Net writes them
  mim_prepare/                                      a page with pictures, a table of what was left out, the log
Image files stay where they are (nnUNet_raw/DatasetXXX_Name/dataset.json names them); DICOM series, which nnU-Net cannot
read, are written there as .nii.gz."""


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after printing a one-line error."""
    options = _parser().parse_args(argv)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from nnunet_mim.preparation.cluster import FLAG, cluster_executor
    from nnunet_mim.preparation.prepare import PrepareConfig, prepare_dataset, prepare_folders
    from nnunet_mim.preparation.prepare_report import next_command, summary_lines, write_report

    required_folder("nnUNet_raw")
    preprocessed = required_folder("nnUNet_preprocessed")
    if options.np < 1 or options.min_slices < 2:
        raise MiMError("-np must be at least 1 and --min_slices at least 2")
    settings = parse_settings(options.set)
    if "spacing" in settings:
        raise MiMError("--set spacing: give it with -s, in the order z y x")
    slurm = parse_settings(options.slurm, FLAG) if options.slurm else None
    if slurm is not None:
        cluster_executor(slurm, options.np, Path(preprocessed))  # says what it does not take before any work
    config = PrepareConfig(
        _spacing(options.s), options.p, options.preset, settings, options.np, options.min_slices, options.overwrite,
        slurm,
    )  # fmt: skip
    if options.n and not options.i:
        raise MiMError("-n names a new dataset: give its folders with -i")
    names = [_new_dataset(options.d, options.n)] if options.i else dataset_names(options.d)
    prepare_workers("nnunet_mim.preparation.prepare_case")
    with ExitStack() as locks:  # all of them before any work
        for name in names:
            busy = f"another mim_prepare is at work on {name}: repeat the command when it has ended"
            locks.enter_context(exclusive_lock(Path(preprocessed, f".mim_prepare_{name}.lock"), busy))
        if options.i:
            results = [prepare_folders(names[0], [Path(path).expanduser() for path in options.i], config)]
        else:
            results = [prepare_dataset(name, config) for name in names]
    for prepared in results:
        counts, *kinds = summary_lines(prepared)
        print(printable_lines("\n".join([f"{prepared.source.dataset}: {counts}", *kinds])))
        print(f"  page: {write_report(prepared)}")
    failures = [failure for prepared in results for failure in prepared.failures()]
    if options.strict and failures:
        raise MiMError(f"--strict: {len(failures)} left out or unreadable, the first is {failures[0]}")
    print(f"next: {next_command([prepared.source for prepared in results])}")


def _new_dataset(given: list[str], name: str | None) -> str:
    """DatasetXXX_Name of the dataset that -i makes or adds to."""
    if len(given) != 1:
        raise MiMError("-i makes one dataset: give one number with -d")
    try:
        existing = dataset_name(given[0])
    except MiMError:
        existing = None
    if existing is not None:
        if name and existing != f"{existing[:10]}_{name}":
            raise MiMError(f"dataset {given[0]} is {existing}: leave out -n, or take a number that is free")
        return existing
    if not given[0].isdigit() or not 0 < int(given[0]) < 1000:
        raise MiMError(f"-d {given[0]}: give a number from 1 to 999")
    if not name or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise MiMError(f"-n {name or ''}: give the new dataset a name of letters, digits, - and _, such as -n MyCT")
    return f"Dataset{int(given[0]):03d}_{name}"


def _spacing(given: list[float]) -> tuple[float, float, float]:
    if len(given) not in (1, 3) or min(given) <= 0:
        raise MiMError(f"-s takes one number or three above 0 (mm, z y x), got {given}")
    return tuple(given * 3 if len(given) == 1 else given)  # type: ignore[return-value]


def _parser() -> OneLineParser:
    parser = OneLineParser(
        "mim_prepare",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("-d", nargs="+", required=True, metavar="DATASET", help="number of the new dataset, or datasets in nnUNet_raw")
    add("-n", metavar="NAME", help="name of the new dataset")
    add("-i", nargs="+", metavar="FOLDER", help="folders with CT, searched to any depth")
    add("-s", nargs="+", type=float, default=[1.5], metavar="MM",
        help="spacing: one number, or three in the order z y x (default: 1.5)")  # fmt: skip
    cores = min(8, usable_cores())
    add("-np", type=int, default=cores, metavar="N",
        help=f"worker processes (default: 8, or the number of cores it may use; here {cores})")  # fmt: skip
    add("-p", default="nnUNetMiMPlans", metavar="PLANS", help="name of the plans (default: nnUNetMiMPlans)")
    add("--preset", choices=list(PRESETS),
        help="network size in the plans (default: that of existing plans, else base)")  # fmt: skip
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="settings of the plans, as for mim_plan, such as ct_window=-1000,1000 patch_size=96,96,96")  # fmt: skip
    add("--min_slices", type=int, default=16, metavar="N", help="minimum number of voxels on every axis (default: 16)")
    add("--overwrite", action="store_true",
        help="begin anew where cases of these plans were prepared with another spacing or window")  # fmt: skip
    add("--slurm", nargs="+", metavar="KEY=VALUE",
        help="prepare in jobs of SLURM, with -np processes each: jobs=N, their number (default: 1), and parameters of "
        "submitit, such as slurm_partition=cpu timeout_min=240; needs pip install 'nnunet_mim[slurm]'")  # fmt: skip
    add("--strict", action="store_true", help="end with exit code 2 if anything was left out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
