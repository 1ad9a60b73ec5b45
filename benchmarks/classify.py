"""Probe of lung nodules: malignant or not, out of fold, among those of 6 to 12 mm of Dataset503_LIDCNodule.

    python benchmarks/classify.py --json [--checkpoint checkpoint_final.pth]

Prepares the crops at 0.7 mm, pretrains a tiny network on them for a few minutes unless --checkpoint names one, and
compares the AUROC of the nodule's size, of size and HU, and of probes on the encoder with random and with pretrained
weights. The seed is fixed. --work keeps everything for another call.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

DATASET = "Dataset503_LIDCNodule"
DATA = Path(os.environ.get("MIM_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
PLANS = "nnUNetMiMPlans"
SIZES = ("diameter_mm", "6", "12")
PRETRAIN = ("--view", "32", "--batch", "4", "--workers", "0", "--seed", "0", "--set", "probe_every=0", "val_every=1000",
            "save_every=1000")  # fmt: skip
ARMS = {"size": "baseline_size", "size_hu": "baseline_size_hu", "probe_random": "probe_random", "probe_mim": "probe"}


def set_folders(work):
    """nnU-Net's folders in `work`, with the dataset; the images stay where they are."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (work / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(work / name)
    os.environ.pop("nnUNet_mim_checkpoint", None)
    link = work / "nnUNet_raw" / DATASET
    if not link.exists():
        link.symlink_to(DATA.resolve() / "nnUNet_raw" / DATASET, target_is_directory=True)


def run(main, *arguments):
    """Run a command of the package; its output goes to stderr."""
    if main([str(argument) for argument in arguments]):
        sys.exit(1)


def pretrained(iterations):
    """The checkpoint of a short pretraining on the crops; that of an earlier call if it is there."""
    from nnunet_mim.pretraining import cli

    folder = Path(os.environ["nnUNet_results"], DATASET, f"MiMPretrain__{PLANS}__3d_fullres", "fold_all")
    if not (folder / "checkpoint_final.pth").is_file():
        resume = ["--c"] if (folder / "checkpoint_latest.pth").is_file() else []
        device = "cuda" if torch.cuda.is_available() else "cpu"
        run(cli.main, "-d", 503, "-p", PLANS, "-device", device, "--iterations", iterations, *PRETRAIN, *resume)
    return folder / "checkpoint_final.pth"


def compare(checkpoint):
    """{"n", "auroc"} of all arms."""
    from nnunet_mim.classification.comparison import evaluate_arms
    from nnunet_mim.classification.encoders import LoadedEncoder, load_encoder, rebuilt_encoder
    from nnunet_mim.classification.features import FeatureExtractor
    from nnunet_mim.classification.job import set_up
    from nnunet_mim.classification.labels import cases_where, labels_file
    from nnunet_mim.classification.options import ClassifyConfig, DataOptions
    from nnunet_mim.classification.train import fit_fold, train_baselines

    config = ClassifyConfig(checkpoint=str(checkpoint), roi="labels", margin=5.0)
    job = set_up(DataOptions("503", PLANS, target=("malignant",)), config)
    mim = load_encoder(job.source, config, "all")
    torch.manual_seed(config.seed)
    random = LoadedEncoder(rebuilt_encoder(mim.architecture).eval(), "random weights", mim.architecture)
    for arm, encoder, of_encoder in (
        ("probe", mim, config),
        ("probe_random", random, replace(config, checkpoint="none")),
    ):
        of_arm = replace(job, config=of_encoder)
        features = FeatureExtractor(encoder, of_encoder).of_cases(job.reader, job.table.cases)
        for fold in range(len(job.folds)):
            fit_fold(of_arm, arm, fold, features, encoder)
    train_baselines(job, range(len(job.folds)))
    kept = cases_where(labels_file(DATASET), *SIZES)
    (evaluation,), _ = evaluate_arms(job.folder, kept)
    auroc = {name: evaluation.figures[arm]["auroc"] for name, arm in ARMS.items()}
    return len(evaluation.arms["probe"].cases), auroc


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", action="store_true", help="print one line of JSON")
    add("--checkpoint", help="of mim_pretrain; without it one is trained")
    add("--iterations", type=int, default=500, help="of that training (default: 500)")
    add("--work", help="folder that is kept")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        set_folders(Path(work).resolve())
        from nnunet_mim.preparation import prepare_cli

        run(prepare_cli.main, "-d", 503, "-s", 0.7, "-p", PLANS, "--preset", "tiny", "--min_slices", 2)
        checkpoint = options.checkpoint or pretrained(options.iterations)
        n, auroc = compare(Path(checkpoint).resolve())
    if options.json:
        print(json.dumps({"n": n, "auroc": {name: round(each.value, 4) for name, each in auroc.items()}}))
    else:
        print(f"{n} nodules of {SIZES[1]} to {SIZES[2]} mm; AUROC (95 % interval):")
        for name, each in auroc.items():
            print(f"  {name:14} {each}")


if __name__ == "__main__":
    main()
