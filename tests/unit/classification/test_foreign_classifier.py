"""A classifier's folder that somebody else has made or changed: it predicts, or ends in one line."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load, save

from nnunet_mim.classification import cli
from nnunet_mim.classification.documents import read_training
from nnunet_mim.classification.results import weights_sha256
from nnunet_mim.errors import MiMError

GIGANTIC = 2**33


def classify(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def export(folders, tmp_path, capsys):
    """An export of one fold of a probe."""
    assert classify("train", "-d", 7, "--target", "lesion", "-device", "cpu", "-pc", "none", "-f", 0) == 0
    assert classify("export", "-d", 7, "--target", "lesion", "--classifier", "probe_random", "-o", tmp_path / "e") == 0
    (tmp_path / "images").mkdir()
    shutil.copy(folders.raw / "imagesTr" / "case_00_0000.nii.gz", tmp_path / "images")
    capsys.readouterr()
    return tmp_path / "e"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
def test_a_pipe_among_the_weights_is_not_shared(export, folders, tmp_path, capsys):
    (weights,) = folders.results.glob("*/lesion/probe_random/encoder_*.safetensors")
    weights.unlink()
    os.mkfifo(weights)
    which = ("-d", 7, "--target", "lesion", "--classifier", "probe_random")
    assert classify("export", *which, "-o", tmp_path / "again") == 2
    said = capsys.readouterr().err
    assert said == f"error: `{weights}` is a named pipe, no file of a classifier: train this fold again\n"
    assert [path.name for path in tmp_path.iterdir() if "again" in path.name] == []


def change(file, *path, value):
    """Set a value in a JSON file."""
    content = json.loads(file.read_text())
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    file.write_text(json.dumps(content))


def change_weights(export, function):
    """Change the weights, and every hash of them."""
    (old,) = export.glob("encoder_*.safetensors")
    weights = {name: function(value) for name, value in load(old.read_bytes()).items()}
    old.unlink()
    sha256 = weights_sha256(weights)
    (export / f"encoder_{sha256[:12]}.safetensors").write_bytes(save(weights))
    change(export / "fold_0" / "settings.json", "encoder", "sha256", value=sha256)


def test_what_is_wrong_is_named_in_one_line(export, tmp_path, capsys, canary):
    """One training serves all changes, which are made to a copy each."""
    settings, probe = ("fold_0", "settings.json"), ("fold_0", "probe.json")
    changes = {
        "NaN": lambda e: change_weights(e, lambda w: torch.full_like(w, torch.nan)),
        "int8": lambda e: change_weights(e, lambda w: w.to(torch.int8)),
        "a network of terabytes": lambda e: change(
            e.joinpath(*settings), "encoder", "architecture", "network", "embed_dims", value=[6, 6, 6, 6 * GIGANTIC]
        ),
        "billions of blocks": lambda e: change(
            e.joinpath(*settings), "encoder", "architecture", "network", "depths", value=[1, 1, 1, GIGANTIC]
        ),
        "targets": lambda e: change(e.joinpath(*settings), "targets", value=["lesion"]),
        "another target": lambda e: change(e.joinpath(*settings), "targets", value={"x": ["0", "1"]}),
        "margin": lambda e: change(e.joinpath(*settings), "config", "margin", value="wide"),
        "no encoder": lambda e: change(e.joinpath(*settings), "encoder", value={}),
        "probe NaN": lambda e: change(e.joinpath(*probe), "lesion", "temperature", value=float("nan")),
        "probe of other features": lambda e: change(e.joinpath(*probe), "lesion", "mean", value=[0.0]),
        "no fold": lambda e: shutil.rmtree(e / "fold_0"),
    }
    for place in ("nonlin", "norm_op", "dropout_op", "conv_op", "network_class_name", "_kw_requires_import"):
        block = {"kind": "resenc", "config": {"encoder": "resenc", "architecture": canary.poisoned(place)}}
        changes[f"a command as {place}"] = lambda e, block=block: change(
            e.joinpath(*settings), "encoder", "architecture", value=block
        )
    given = ("-i", tmp_path / "images", "-device", "cpu", "-o", tmp_path / "out.csv")
    for name, make in {"nothing": lambda _: None, **changes}.items():
        copy = tmp_path / name
        shutil.copytree(export, copy)
        make(copy)
        code = classify("predict", "-m", copy, *given)
        line = capsys.readouterr().err.strip().splitlines()[-1:]
        assert code == (0 if name == "nothing" else 2), (name, line)
        assert name == "nothing" or (line[0].startswith("error: ") and str(copy) in line[0]), (name, line)
        assert not canary.file.exists(), name


TRAINED = {
    "temperatures": {"lesion": 1.5}, "sha256": "0" * 64, "skipped_steps": 0, "history": [{"epoch": 0.0}],
    "inner_cases": ["case_00"],
}  # fmt: skip


def test_training_json_is_checked_whole(tmp_path):
    file = tmp_path / "training.json"
    for good in (TRAINED, {**TRAINED, "inner_cases": 1}):
        file.write_text(json.dumps(good))
        assert read_training(tmp_path) == good
    changes = [
        {"temperatures": {"lesion": 0}}, {"temperatures": {"lesion": float("nan")}}, {"temperatures": [1.0]},
        {"sha256": 5}, {"sha256": "../../x"}, {"skipped_steps": -1}, {"history": {"epoch": 1}}, {"history": [["a"]]},
        {"inner_cases": None}, {"inner_cases": [5]},
    ]  # fmt: skip
    for change in changes:
        file.write_text(json.dumps({**TRAINED, **change}))
        with pytest.raises(MiMError, match=rf"training\.json: {next(iter(change))}.*train this fold again"):
            read_training(tmp_path)


def test_a_report_of_settings_that_were_changed_ends_in_one_line(export, folders, capsys):
    (settings,) = folders.results.rglob("probe_random/fold_0/settings.json")
    whole = settings.read_text()
    changes = (
        (("config",), []), (("config", "roi"), 5), (("encoder",), "none"), (("encoder", "origin"), ["a"]),
        (("encoder", "seen_validation_cases"), 3), (("n_validation_cases",), "many"), (("folds",), {}),
    )  # fmt: skip
    for path, value in changes:
        change(settings, *path, value=value)
        assert classify("report", "-d", 7, "--target", "lesion") == 2, path
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: {settings}: {path[0]}"), line
        settings.write_text(whole)


def test_settings_of_an_export_that_were_changed_end_in_one_line(export, tmp_path, capsys):
    for field, value in (("dataset", "../../etc"), ("plans", 5), ("configuration", None)):
        content = (export / "settings.json").read_text()
        change(export / "settings.json", field, value=value)
        given = ("-i", tmp_path / "images", "-o", tmp_path / "out.csv", "-device", "cpu")
        assert classify("predict", "-m", export, *given) == 2
        assert f"settings.json: {field}: " in capsys.readouterr().err
        (export / "settings.json").write_text(content)
