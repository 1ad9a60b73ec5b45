"""Networks trained on made-up lesions: what is learnt, chosen, written, continued, predicted and exported."""

import csv
import json
import os
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from lightning_fabric import Fabric
from sklearn.metrics import roc_auc_score

from nnunet_mim.classification import cli
from nnunet_mim.classification.finetune import (
    _crops,
    _network,
    batch_loss,
    inner_split,
    outputs_of,
    prepare_fold,
    start_from_probe,
    train_fold,
)
from nnunet_mim.classification.job import set_up
from nnunet_mim.classification.options import ClassifyConfig, DataOptions
from nnunet_mim.classification.probe import fit_probe
from nnunet_mim.classification.results import joined, read_predictions
from nnunet_mim.classification.training_crops import training_batches
from nnunet_mim.classification.training_state import TrainingState
from nnunet_mim.pretraining.distributed.ranks import ALONE, Ranks
from nnunet_mim.pretraining.stopping import StoppedError

NETWORK = ("--lr", "2e-3", "--workers", 0, "-device", "cpu", "--no-baselines", "--margin", 4)
TRAIN = ("train", "-d", 7, "--target", "lesion", "--roi", "labels", "--folds", 3, *NETWORK)


def classify(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def arms(folders):
    return folders.results / "mim_classify__nnUNetPlans__3d_fullres" / "lesion"


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def job_of(folders):
    """job_of(**settings): a job on the made-up lesions, from random weights unless told otherwise."""

    def make(targets=("lesion",), **settings):
        usual = {"mode": "scratch", "roi": "labels", "margin": 4.0, "folds": 3, "lr": 2e-3, "epochs": 2}
        return set_up(DataOptions("7", target=targets), ClassifyConfig(**{**usual, **settings}))

    return make


def out_of_fold(folder, number=0):
    return joined([read_predictions(path)[number] for path in sorted(folder.glob("fold_*/predictions.csv"))])


def table(path):
    return {row["case"]: row for row in csv.DictReader(path.open())}


@pytest.mark.slow
def test_lesions_are_told_predicted_exported_and_shown(folders, arms, make_checkpoint, tmp_path, capsys, monkeypatch):
    """The whole way from a checkpoint; a prediction of a raw image is the out-of-fold value of the same fold."""
    path, _ = make_checkpoint()
    assert classify(*TRAIN, "--mode", "finetune", "-pc", path, "--epochs", 6, "--covariate", "voxels") == 0
    found = out_of_fold(arms / "finetune")
    assert len(found.cases) == 36
    assert roc_auc_score(found.target.labels, found.positive) >= 0.95
    joint = out_of_fold(arms / "finetune+covariates")  # its regression has seen the eight cases of the inner split only
    assert roc_auc_score(joint.target.labels, joint.positive) >= 0.8
    assert "lesion: finetune has an AUROC of" in capsys.readouterr().out
    assert not list(arms.rglob("checkpoint_latest.pth"))
    history = json.loads((arms / "finetune" / "fold_0" / "training.json").read_text())["history"]
    assert [row["epoch"] for row in history] == list(range(7))
    path.unlink()  # needed no more

    images, masks = tmp_path / "images", folders.raw / "labelsTr"
    images.mkdir()
    cases = [f"case_{i:02d}" for i in (0, 1, 14)]
    for case in cases:
        shutil.copy(folders.raw / "imagesTr" / f"{case}_0000.nii.gz", images)
    given = ("-i", images, "--roi", masks, "-device", "cpu")
    maps = tmp_path / "maps"
    which = ("-d", 7, "--target", "lesion", "--classifier", "finetune")
    assert classify("predict", *which, *given, "-o", tmp_path / "out.csv", "--saliency", maps) == 0
    rows = table(tmp_path / "out.csv")
    expected = dict(zip(found.cases, zip(found.folds, found.positive, strict=True), strict=True))
    for case in cases:
        fold, p = expected[case]
        assert float(rows[case][f"lesion=1:fold_{fold}"]) == pytest.approx(p, abs=1e-4)
        image = sitk.ReadImage(str(folders.raw / "imagesTr" / f"{case}_0000.nii.gz"))
        shown = sitk.ReadImage(str(maps / f"{case}_lesion.nii.gz"))
        for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(shown, geometry)() == pytest.approx(getattr(image, geometry)())
    for case in ("case_00", "case_14"):  # lesions: the ball is what speaks for one
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(maps / f"{case}_lesion.nii.gz")))
        ball = sitk.GetArrayFromImage(sitk.ReadImage(str(masks / f"{case}.nii.gz"))) > 0
        assert ball[np.unravel_index(values.argmax(), values.shape)]

    report = ("report", "-d", 7, "--target", "lesion", "--saliency", "-device", "cpu")
    assert classify(*report) == 0
    page = (arms / "report.html").read_text()
    assert "what finetune rests on, worst cases" in page
    assert "red speaks for 1, blue against it" in page
    assert page.count("and below them what the network rests on") == 2

    export = tmp_path / "elsewhere" / "classifier"
    assert classify("export", *which, "-o", export, "--licence", "cc-by-4.0") == 0
    card = (export / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert "AUROC" in card
    texts = [p.read_text() for p in export.rglob("*") if p.suffix in (".json", ".md")]
    assert not any(re.search(r"case_\d", text) or str(tmp_path) in text for text in texts)
    assert classify("export", *which, "-o", export) == 2
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{name}")
    shutil.rmtree(folders.base)
    assert classify("predict", "-m", export, *given, "-o", tmp_path / "again.csv") == 0
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "out.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.long
def test_shuffled_labels_are_not_told(folders, arms, tmp_path):
    """Nothing leaks from the validation cases, neither by training nor by the choice of the epoch."""
    rows = list(csv.reader((folders.raw / "labels.csv").open()))
    found = []
    for seed in range(3):
        lesion = np.random.default_rng(seed).permutation([row[2] for row in rows[1:]])
        path = tmp_path / f"shuffled_{seed}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([rows[0], *([*r[:2], v, *r[3:]] for r, v in zip(rows[1:], lesion, strict=True))])
        assert classify(*TRAIN, "--mode", "scratch", "--epochs", 5, "--labels", path, "-o", seed) == 0
        predicted = out_of_fold(arms / f"scratch_{seed}")
        found.append(roc_auc_score(predicted.target.labels, predicted.positive))
        (folders.base / "splits_classification.json").unlink()
    assert 0.25 < np.mean(found) < 0.65, found


class KilledError(Exception):
    pass


def test_a_resumed_training_equals_one_that_was_not_interrupted(job_of, arms, fabric):
    """Killed within the second epoch: goes on from the first. Stopped by a signal: from that very step."""

    def kill(step):
        if step == 3:
            raise KilledError

    def stop(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    ways = (("whole", None, None), ("killed", kill, KilledError), ("stopped", stop, StoppedError))
    for tag, interrupt, error in ways:
        run = prepare_fold(job_of(tag=tag, batch=8), 0)
        assert run.recipe.iterations_per_epoch == 2
        if error:
            with pytest.raises(error):
                train_fold(run, fabric, 0, False, interrupt)
            run = prepare_fold(job_of(tag=tag, batch=8), 0)
        steps = []
        train_fold(run, fabric, 0, bool(error), steps.append)
        assert steps == {"whole": [1, 2, 3, 4], "killed": [3, 4], "stopped": [4]}[tag]
    whole = arms / "scratch_whole" / "fold_0"
    for tag in ("killed", "stopped"):
        for name in ("model.safetensors", "training.json", "predictions.csv"):
            assert (arms / f"scratch_{tag}" / "fold_0" / name).read_bytes() == (whole / name).read_bytes()


def test_folders_that_hold_a_training(folders, arms, capsys):
    few = (*TRAIN, "--mode", "scratch", "-f", 0, "--epochs", 1)
    assert classify(*few, "--c") == 2
    assert classify(*few) == 0
    assert classify(*few) == 2
    assert classify(*few, "--c") == 0  # finished already
    state = TrainingState(torch.nn.Linear(1, 1), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1))
    fold = arms / "scratch_other" / "fold_0"
    fold.mkdir(parents=True)
    state.save(fold / "checkpoint_latest.pth", {"lr": 1.0})
    assert classify(*few, "-o", "other", "--c") == 2
    assert classify(*TRAIN, "--mode", "scratch", "--batch", 5, "-num_gpus", 2) == 2
    assert classify(*TRAIN, "-pc", "none") == 2
    lines = capsys.readouterr().err.splitlines()
    messages = (
        "--c: nothing to continue", "holds another training: continue it with --c", "lr 1.0 -> 0.002",
        "--batch 5 is the batch of all 2 devices", "--workers are for trained networks",
    )  # fmt: skip
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == len(messages)
    assert all(message in line for message, line in zip(messages, errors, strict=True))


def test_a_network_learns_what_its_start_does_not_know(job_of, arms, fabric, monkeypatch):
    """Without the logistic regression at the start: steps alone tell lesions of the inner split."""
    monkeypatch.setattr("nnunet_mim.classification.finetune.start_from_probe", lambda *_: None)
    train_fold(prepare_fold(job_of(epochs=8, batch=8), 0), fabric, 0, False)
    history = json.loads((arms / "scratch" / "fold_0" / "training.json").read_text())["history"]
    assert history[0]["inner_loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert min(row["inner_loss"] for row in history) < 0.4


def test_heads_start_as_logistic_regressions(job_of):
    """Their logits are those that scikit-learn's model has on the network's features, whatever the classes weigh."""
    run = prepare_fold(job_of(), 0)
    run = replace(run, log_weights={"lesion": np.array([0.3, -0.7])})
    network = _network(run, torch.device("cpu"))
    start_from_probe(network, run, ALONE)
    rows, table = run.split.train, run.job.table
    features = np.stack([network.features(run.job.reader.read(table.cases[row]))["lesion"] for row in rows])
    labels = table.targets[0].labels[rows]
    fitted = fit_probe(features, labels, [table.patients[row] for row in rows], 2, 0).probe
    outputs = outputs_of(network, run, rows, ALONE)["lesion"]
    np.testing.assert_allclose(outputs, fitted.logits(features), rtol=1e-3, atol=1e-3)
    assert roc_auc_score(labels, outputs[:, 1] - outputs[:, 0]) >= 0.9


def test_the_inner_split_has_patients_of_its_own(job_of):
    job = job_of()
    for fold in range(3):
        split = inner_split(job, fold)
        patients = [{job.table.patients[row] for row in rows} for rows in (split.train, split.held_out)]
        val = {job.table.patients[row] for row in job.folds.validation[fold]}
        assert not patients[0] & patients[1]
        assert not (patients[0] | patients[1]) & val
        assert sorted([*split.train, *split.held_out]) == list(job.folds.training[fold])


def test_the_best_epoch_is_kept():
    model = torch.nn.Linear(1, 1)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), 0.1))
    for value, loss in ((1.0, 0.5), (2.0, 0.3), (3.0, 0.4)):
        torch.nn.init.constant_(model.weight, value)
        state.add_epoch({"epoch": value, "inner_loss": loss})
    assert state.best["weight"].item() == 2.0
    assert state.lowest == 0.3


def test_the_control_has_the_network_and_the_batches_of_its_twin(job_of, make_checkpoint):
    path, encoder = make_checkpoint()
    runs = [prepare_fold(job_of(mode=mode, checkpoint=str(path)), 0) for mode in ("finetune", "scratch")]
    pretrained, control = (run.encoder.module.state_dict() for run in runs)
    assert {n: v.shape for n, v in pretrained.items()} == {n: v.shape for n, v in control.items()}
    assert all(torch.equal(pretrained[name], value) for name, value in encoder.state_dict().items())
    assert not torch.equal(control["token_proj.weight"], pretrained["token_proj.weight"])
    assert runs[0].recipe == runs[1].recipe
    made = [(_crops(run)[5].images, *_network(run, "cpu").model.pools.parameters()) for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_several_targets_with_missing_values(job_of, folders, arms, fabric, tmp_path):
    """A case without a label of a target is predicted, but gives that target no gradient and no temperature."""
    text = (folders.raw / "labels.csv").read_text().splitlines()
    lines = [line.replace(",1,", ",,", 1) if i % 5 == 0 else line for i, line in enumerate(text[1:])]
    path = tmp_path / "some.csv"
    path.write_text("\n".join([text[0], *lines]))
    job = job_of(("lesion", "kind"), labels=str(path), mask_channel=True, balance="sampling", epochs=1)
    assert (job.table.target("lesion").labels < 0).sum() == 4
    train_fold(prepare_fold(job, 0), fabric, 0, False)
    folder = arms.parent / "lesion+kind" / "scratch" / "fold_0"
    parts = read_predictions(folder / "predictions.csv")
    assert [part.target.classes for part in parts] == [("0", "1"), ("a", "b", "c")]
    assert all(np.isfinite(part.calibrated).all() for part in parts)
    assert set(json.loads((folder / "training.json").read_text())["temperatures"]) == {"lesion", "kind"}


@pytest.mark.parametrize("balance", ["weights", "sampling"])
def test_balanced_classes_and_true_shares(balance, job_of, tmp_path, folders):
    """Of a rare class: it counts as much as the other, and what is learnt without any image is its true share."""
    rows = list(csv.reader((folders.raw / "labels.csv").open()))
    rare = [[*row[:2], int(i % 4 == 0), *row[3:]] for i, row in enumerate(rows[1:])]
    path = tmp_path / "rare.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *rare])
    run = prepare_fold(job_of(balance=balance, labels=str(path)), 0)
    target, train = run.job.table.targets[0], run.split.train
    share = (target.labels[train] == 1).mean()
    assert share == pytest.approx(0.25)
    crops = _crops(run)
    drawn = np.array([crops.labels[crops.case_number(i), 0] for i in range(2000)])
    assert drawn.mean() == pytest.approx(0.5 if balance == "sampling" else share, abs=0.04)
    bias = torch.zeros(2, requires_grad=True)  # a network that sees nothing
    optimizer = torch.optim.SGD([bias], 1.0)
    weights = run.log_weights if balance == "weights" else {}
    for _ in range(200):
        optimizer.zero_grad()
        batch_loss({"lesion": bias.expand(2000, 2)}, torch.from_numpy(drawn)[:, None], weights, 2000).backward()
        optimizer.step()
    assert bias.detach().softmax(0)[1] == pytest.approx(0.5, abs=0.05)
    corrected = bias.detach() - torch.from_numpy(run.log_weights["lesion"])
    assert corrected.softmax(0)[1] == pytest.approx(share, abs=0.05)


def test_ranks_share_a_batch(job_of):
    """The parts of two ranks are the batch of one, and their gradients add up to its gradient."""
    run = prepare_fold(job_of(batch=4, mask_channel=True), 0)
    crops, model = _crops(run), _network(run, torch.device("cpu")).model.double()
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter)

    def gradients(ranks):
        batch = next(training_batches(crops, 3, 4, 0, torch.device("cpu"), ranks))
        model.zero_grad()
        logits = model(batch.images.double(), batch.places, batch.n_windows)
        batch_loss(logits, batch.labels, run.log_weights, 4).backward()
        return batch.images, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    images, whole = gradients(ALONE)
    parts = [gradients(Ranks(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([part[0] for part in parts]), images)
    torch.testing.assert_close(parts[0][1] + parts[1][1], whole, rtol=1e-5, atol=1e-7)  # logits pass through float32


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_equal_one(folders, arms):
    """The command on two processes that share each batch."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "nnunet_mim.classification.cli", *map(str, TRAIN), "--mode", "scratch"]
    command += ["-f", "0", "--epochs", "2"]
    for tag, more in (("one", []), ("two", ["-num_gpus", "2"])):
        done = subprocess.run([*command, "-o", tag, *more], capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("wrote ") == 1
    one, two = (out_of_fold(arms / f"scratch_{tag}") for tag in ("one", "two"))
    np.testing.assert_allclose(one.raw, two.raw, atol=1e-3)


def test_whole_cases_by_windows(job_of, fabric):
    """Several random windows of a case in training; at prediction all of them, pooled together."""
    run = prepare_fold(job_of(roi="", window=(16,), case_windows=2), 0)
    crops = _crops(run)
    items = [crops[i] for i in range(6)]
    assert {item.n_windows[0] for item in items} == {2}
    assert all(item.images.shape[1:] == (1, 16, 16, 16) for item in items)
    network = _network(run, torch.device("cpu"))
    for parameter in [*network.model.heads.parameters(), *network.model.pools.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    case = run.job.reader.read(run.job.table.cases[0])
    regions = network.regions(case)
    assert len(regions) > 2
    images = torch.stack([torch.from_numpy(region.voxels) for region in regions])
    places = torch.stack([torch.from_numpy(region.places) for region in regions])
    with torch.no_grad():
        together = network.model(images, places, [len(regions)])["lesion"][0]
    np.testing.assert_allclose(network.logits(case)["lesion"], together, rtol=1e-4, atol=1e-5)
    run = replace(run, log_weights={"lesion": np.array([0.0, 1.0])})
    outputs = outputs_of(network, run, np.array([0, 1]), ALONE)["lesion"]
    np.testing.assert_allclose(outputs[0], together.numpy() - [0, 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("predict", "-i", "x", "-o", "y", "-device", "cpu"), "which classifier? Give -d DATASET"),
        (("predict", "-d", 7, "-i", "x", "-o", "y", "-device", "cpu"), "which classifier? Give -d DATASET"),
        (("predict", "-m", "nowhere", "-i", "x", "-o", "y", "-device", "cpu"), "-m nowhere is no folder of"),
        (("export", "-d", 7, "--target", "lesion", "-o", "x"), "nothing is trained in"),
        ((*TRAIN, "--mode", "scratch", "--epochs", 0), "--epochs must be at least 1"),
        ((*TRAIN, "--mode", "scratch", "--layer_decay", 2), "--layer_decay too and at most 1"),
        ((*TRAIN, "--mode", "finetune"), "no pretraining checkpoint for"),
    ],
)
def test_bad_input_ends_in_one_line(folders, capsys, arguments, message):
    assert classify(*arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
