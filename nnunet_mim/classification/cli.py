"""`mim_classify`. The flags of `train` are fields of DataOptions and ClassifyConfig."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_mim.classification.options import ClassifyConfig, DataOptions, MachineOptions, TrainedOptions
from nnunet_mim.errors import MiMError, exit_code
from nnunet_mim.system.cli import OneLineParser, add_flags, given_flags
from nnunet_mim.system.locks import exclusive_lock

if TYPE_CHECKING:
    from nnunet_mim.classification.job import Job
    from nnunet_mim.nnunet.source import Source

DESCRIPTION = """\
Tell diseases from CT: from a table of labels to a validated classifier.

  mim_classify train -d 503 --target malignant --roi labels
  mim_classify report -d 503 --target malignant
  mim_classify predict -d 503 --target malignant -i FOLDER --roi MASKS -o out.csv
  mim_classify export -d 503 --target malignant -o my_classifier"""

TRAIN = """\
Train a classifier in every fold, and baselines beside it.

  mim_classify train -d 503 -p nnUNetMiMPlans --target malignant --roi labels
  mim_classify train -d 503 -p nnUNetMiMPlans --target malignant --roi labels -pc none      the control
  mim_classify train -d 503 -p nnUNetMiMPlans --target malignant --roi labels --mode finetune
  mim_classify train -d 503 -p nnUNetMiMPlans --target malignant --roi labels --mode scratch     its control

nnUNet_raw/DatasetXXX_Name/labels.csv has the columns case, patient (optional), and one per target; --covariate names
further columns of numbers. All of a patient's cases are in the same fold. Walk: docs/tutorials/classification.md."""

TRAIN_EPILOG = """\
Output, in nnUNet_results/DatasetXXX_Name/mim_classify__PLANS__CONFIGURATION/TARGETS:
  MODE/fold_X/          predictions.csv of the validation cases, settings.json, the classifier
                        checkpoint_latest.pth while a network is trained, for --c
  baseline_.../fold_X/  the same of baselines that see the prevalence, the size, size and HU, covariates only"""

REPORT = """\
Compare all classifiers and baselines of some targets on out-of-fold predictions: one HTML page, a table as CSV and
Markdown. mim_classify train writes it too, once all folds are there."""

PREDICT = """\
Classify raw images: nnU-Net's own preprocessing, the mean of all trained folds, and each fold's value.

  mim_classify predict -d 503 --target malignant -i IMAGES --roi MASKS -o out.csv
  mim_classify predict -m FOLDER -i IMAGES --roi MASKS -o out.csv                   of mim_classify export"""

PREDICT_EPILOG = """\
Columns of the table: case; per target TARGET, the most probable class; TARGET=CLASS, its calibrated probability as the
mean over folds; TARGET=CLASS:fold_X, that of each fold. A map of --saliency is above 0 where the image speaks for the
last class, below 0 where it speaks against it."""

EXPORT = """\
Write a finished classifier as a folder: weights (safetensors), settings, plans, and a card (README.md). It predicts
elsewhere without the dataset. Names of cases are left out.

  mim_classify export -d 503 --target malignant -o my_classifier
  mim_classify predict -m my_classifier -i IMAGES -o out.csv"""

CLASSIFIER = "which one, where several are trained: the name of its results folder (default: the only one)"


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 2 after a one-line error, or 75 if a signal has stopped a training."""
    options = _parser().parse_args(argv)
    from nnunet_mim.pretraining.stopping import EXIT_CODE, StoppedError

    try:
        return exit_code(lambda: options.run(options))
    except StoppedError as stopped:
        print(stopped)
        return EXIT_CODE


def train(options: argparse.Namespace) -> Path:
    """Train the chosen folds, then report if all are there. Returns the folder of the results."""
    where = DataOptions(**given_flags(options, DataOptions))
    config = ClassifyConfig(**given_flags(options, ClassifyConfig))
    machine = MachineOptions(**given_flags(options, MachineOptions))
    import torch

    from nnunet_mim.classification.job import chosen_folds, set_up
    from nnunet_mim.classification.train import train_baselines, train_probe
    from nnunet_mim.pretraining.distributed.launch import end_process_group, is_first_rank

    _check_device(torch, options.device)
    job = set_up(where, config)
    folds = chosen_folds(options.fold, len(job.folds))
    if config.mode == "probe":
        if machine != MachineOptions():
            raise MiMError("--c, -num_gpus, --precision and --workers are for trained networks: leave them out")
        train_probe(job, folds, options.device)
    else:
        _train_networks(job, folds, machine, options.device)
    if is_first_rank():
        if options.baselines:
            train_baselines(job, folds)
        if job.is_complete(config.arm):
            from nnunet_mim.classification.report import write_report

            print("\n".join(write_report(job.folder, job.source, seed=config.seed)))
    end_process_group()
    return job.folder


def _train_networks(job: Job, folds: Sequence[int], machine: MachineOptions, device: str) -> None:
    from nnunet_mim.classification.finetune import check_batch, check_folders, prepare_fold, train_fold
    from nnunet_mim.pretraining.distributed.launch import device_count, is_first_rank, launched_fabric, say
    from nnunet_mim.pretraining.options import RunOptions

    devices, nodes = device_count(machine.num_gpus)
    check_batch(job.config.batch, devices * nodes)
    how = RunOptions(device=device, precision=machine.precision, workers=machine.workers).resolved(devices)
    with ExitStack() as locks:
        if is_first_rank():
            for folder in (job.fold_folder(job.config.arm, fold) for fold in folds):
                busy = f"another mim_classify writes to {folder}: wait until it has ended, or choose a tag with -o"
                locks.enter_context(exclusive_lock(folder.with_name(f".{folder.name}.lock"), busy))
        todo = check_folders(job, folds, machine.resume)
        fabric = launched_fabric(device, devices, nodes, how.precision)
        for fold in todo:
            run = prepare_fold(job, fold)
            job = run.job  # the window is the same for all folds
            size = " x ".join(map(str, run.job.config.window))
            cases = f"{len(run.split.train)} training and {len(run.split.held_out)} inner cases"
            say(f"fold {fold}: {cases}, windows of {size} voxels (the plans' order of axes), {run.total} steps")
            say("\n".join([f"encoder: {run.encoder.origin}", *run.encoder.notes]))
            train_fold(run, fabric, how.workers or 0, machine.resume)


def report(options: argparse.Namespace) -> Path:
    """Compare what is trained. Returns the folder of the results."""
    where = DataOptions(**given_flags(options, DataOptions))
    from nnunet_mim.classification.labels import cases_where, labels_file
    from nnunet_mim.classification.report import write_report
    from nnunet_mim.classification.results import targets_folder
    from nnunet_mim.nnunet.datasets import require_environment
    from nnunet_mim.nnunet.source import find_source

    if options.saliency:
        import torch

        _check_device(torch, options.device)
    require_environment()
    source = find_source(where.dataset, where.plans, where.configuration)
    kept, which = None, ""
    if options.where:
        column, low, high = options.where
        kept = cases_where(labels_file(source.dataset, options.labels), column, low, high)
        which = f"{column} from {low} to below {high}"
    folder = targets_folder(source, where.target)
    saliency = options.device if options.saliency else None
    print("\n".join(write_report(folder, source, kept, which, options.seed, saliency)))
    return folder


def predict(options: argparse.Namespace) -> None:
    """Classify raw images."""
    where = TrainedOptions(**given_flags(options, TrainedOptions))
    import torch

    from nnunet_mim.classification.export import exported_source
    from nnunet_mim.classification.predict import load_classifier, predict_folder

    _check_device(torch, options.device)
    if where.export:
        folder, source = Path(where.export), exported_source(Path(where.export))
    else:
        folder, source = _trained(where, options.classifier)
    classifier = load_classifier(folder, options.fold, options.device)
    masks, saliency = (Path(given) if given else None for given in (options.roi, options.saliency))
    print("\n".join(predict_folder(classifier, source, Path(options.i), masks, Path(options.o), saliency)))


def export(options: argparse.Namespace) -> None:
    """Write a classifier as a folder."""
    where = DataOptions(**given_flags(options, DataOptions))
    from nnunet_mim.classification.export import export_classifier

    folder, source = _trained(where, options.classifier)
    export_classifier(folder, source, Path(options.o), options.licence, options.data)
    print(f"wrote {options.o}\nnext: mim_classify predict -m {options.o} -i IMAGES -o out.csv")


def _trained(where: DataOptions, name: str) -> tuple[Path, Source]:
    """The results folder of a classifier, and its dataset."""
    from nnunet_mim.classification.predict import find_classifier
    from nnunet_mim.classification.results import targets_folder
    from nnunet_mim.nnunet.datasets import require_environment
    from nnunet_mim.nnunet.source import find_source

    require_environment()
    source = find_source(where.dataset, where.plans, where.configuration)
    return find_classifier(targets_folder(source, where.target), name), source


def _check_device(torch: Any, device: str) -> None:
    if device != "cpu" and not getattr(torch, device).is_available():
        raise MiMError(f"no {device} device found: add -device cpu")


def _parser() -> OneLineParser:
    parser = OneLineParser("mim_classify", description=DESCRIPTION)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(function: Callable[..., Any], summary: str, description: str, epilog: str = "") -> Any:
        texts: dict[str, Any] = {"help": summary, "description": description, "epilog": epilog}
        made = commands.add_parser(function.__name__, **texts)
        made.set_defaults(run=function)
        return made

    made = command(train, "train a classifier and its baselines", TRAIN, TRAIN_EPILOG)
    add_flags(made, "data", DataOptions)
    add_flags(made, "what is computed", ClassifyConfig)
    add_flags(made, "how this machine trains a network", MachineOptions)
    add = made.add_argument
    folds = "folds to train, or all (default: all)"
    add("-f", "--fold", nargs="+", default=["all"], metavar="FOLD", help=folds)
    baselines = "train the baselines too (default: on)"
    add("--baselines", action=argparse.BooleanOptionalAction, default=True, help=baselines)
    _add_device(made)

    made = command(report, "compare classifiers and baselines", REPORT)
    add_flags(made, "data", DataOptions)
    add = made.add_argument
    where = "only cases whose number in a column of the table is at least LOW and below HIGH"
    add("--where", nargs=3, metavar=("COLUMN", "LOW", "HIGH"), help=where)
    add("--labels", default="", metavar="FILE", help="table of labels (default: labels.csv in nnUNet_raw/DatasetXXX)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the intervals (default: 0)")
    saliency = "show what the best trained network rests on, in its worst and best cases"
    add("--saliency", action="store_true", help=saliency)
    _add_device(made)

    made = command(predict, "classify raw images", PREDICT, PREDICT_EPILOG)
    add_flags(made, "which classifier", TrainedOptions)
    add = made.add_argument
    add("-i", required=True, metavar="FOLDER", help="images, named as in imagesTr")
    add("-o", required=True, metavar="FILE.csv", help="table to write")
    add("--roi", metavar="MASKS", help="folder of masks, named as in labelsTr, for a classifier that looks at a region")
    add("--classifier", default="", metavar="NAME", help=CLASSIFIER)
    add("-f", "--fold", nargs="+", default=["all"], metavar="FOLD", help="folds whose mean is taken (default: all)")
    add("--saliency", metavar="FOLDER", help="write maps of what a network rests on, CASE_TARGET.nii.gz")
    _add_device(made)

    made = command(export, "write a classifier as a folder to share", EXPORT)
    add_flags(made, "data", DataOptions)
    add = made.add_argument
    add("-o", required=True, metavar="FOLDER", help="new folder to write")
    add("--classifier", default="", metavar="NAME", help=CLASSIFIER)
    add("--licence", metavar="ID", help="of the weights, such as cc-by-4.0 (default: not stated)")
    add("--data", metavar="TEXT", help="for the card: which images, and under which licence (default: not stated)")
    return parser


def _add_device(command: Any) -> None:
    command.add_argument("-device", choices=["cuda", "cpu", "mps"], default="cuda", help="default: cuda")


if __name__ == "__main__":
    sys.exit(main())
