"""Names and structure of the files that commands write, see files.json."""

import csv
import json
import re

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CLASS_PATH = "nnunet_mim.networks.hybrid_unet.HybridUNet"


def structure(value):
    """Keys of mappings at every level, of a list what its entries have in common, else the name of the type."""
    if isinstance(value, dict):
        return {collapsed(key): structure(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        kinds = [structure(v) for v in value]
        if kinds and isinstance(kinds[0], dict):
            return [{key: kind for entry in kinds for key, kind in entry.items()}]
        return "list"
    return type(value).__name__


def collapsed(key):
    """A name in which numbers of layers are a #."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", str(key))


def files_below(folder):
    """Paths below a folder, without what in TensorBoard's names changes."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted({re.sub(r"(?<=tfevents).*", "", name) for name in found})


@pytest.fixture
def stored(small_run):
    """stored(name) → content of a checkpoint; nothing in it is executed."""

    def load(name):
        folder = small_run.latest if "latest" in name else small_run.run
        return torch.load(folder / name, map_location="cpu", weights_only=True)

    return load


def test_files_of_a_pretraining(small_run, frozen):
    files = [name for name in files_below(small_run.folder / "nnUNet_results") if not name.endswith(".lock")]
    frozen("files.json", "files of a pretraining", files)
    frozen("files.json", "files of a stopped pretraining", files_below(small_run.latest))
    cached = files_below(small_run.folder / "nnUNet_preprocessed" / "Dataset901_Labelled" / "mim_case_index")
    assert cached == ["nnUNetPlans_3d_fullres.npz"]


def test_a_tag_and_no_fold_are_in_the_names(work, command, one_iteration):
    """-o, no -f, and another dataset's pointer to the checkpoint."""
    where = one_iteration.index("-f")
    options = [*one_iteration[:where], *one_iteration[where + 2 :]]
    assert command("mim_pretrain", *options, "-o", "tag") == 0
    name = "MiMPretrain_tag__nnUNetPlans__3d_fullres"
    run = work / "nnUNet_results" / "Dataset901_Labelled" / name / "fold_all"
    assert (run / "checkpoint_final.pth").is_file()
    pointer = work / "nnUNet_results" / "Dataset902_Images" / name / "fold_all" / "checkpoint_final.json"
    target = f"../../../Dataset901_Labelled/{name}/fold_all/checkpoint_final.pth"
    assert json.loads(pointer.read_text()) == {"checkpoint": target}


@pytest.mark.parametrize("part", ["train", "val"])
def test_columns(small_run, frozen, part):
    with (small_run.run / f"{part}.csv").open() as file:
        rows = list(csv.reader(file))
    frozen("files.json", f"columns of {part}.csv", rows[0])
    assert [row[0] for row in rows[1:]] == {"train": ["1", "2", "3", "4"], "val": ["0", "2", "4"]}[part]


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "checkpoint_latest.pth"])
def test_keys_of_checkpoints(stored, frozen, name):
    checkpoint = stored(name)
    weights = checkpoint.pop("network_weights")
    optimizer = checkpoint.get("resume_state", {}).get("optimizer", {})
    if optimizer:
        assert set(optimizer) == set(weights)
        kinds = {tuple(sorted(state)) for state in optimizer.values()}
        checkpoint["resume_state"]["optimizer"] = {"of each weight": [list(kind) for kind in sorted(kinds)]}
    frozen("files.json", "weights", sorted({collapsed(name) for name in weights}))
    key = "resumable checkpoint" if optimizer else "checkpoint"
    frozen("files.json", key, structure(checkpoint))


def test_plain_values_of_a_checkpoint(stored, frozen):
    checkpoint = stored("checkpoint_final.pth")
    provenance = checkpoint["provenance"]
    names = ("datasets", "plans_name", "configuration", "fold", "spacing", "transpose_forward", "image_reader_writer",
             "normalization", "iterations", "cases", "crops_seen", "skipped_steps")  # fmt: skip
    without = [{key: text for key, text in case.items() if key != "fingerprint"} for case in provenance["cases"]]
    assert len({case["fingerprint"] for case in provenance["cases"]}) == len(without)  # not stored: rounded numbers
    frozen("files.json", "provenance", {name: provenance[name] for name in names} | {"cases": without})
    frozen("files.json", "nnssl_adaptation_plan", checkpoint["nnssl_adaptation_plan"])
    assert checkpoint["nnssl_adaptation_plan"]["architecture_plans"]["arch_class_name"] == CLASS_PATH
    frozen("files.json", "mim_config", checkpoint["mim_config"])


def test_tensorboard_tags(small_run, frozen):
    board = EventAccumulator(str(small_run.run / "tensorboard"))
    board.Reload()
    tags = {kind: names for kind, names in board.Tags().items() if names}
    frozen("files.json", "tensorboard", {kind: sorted(names) for kind, names in tags.items()})


def test_config_yaml(small_run, stored, frozen):
    settings = yaml.safe_load((small_run.run / "config.yaml").read_text())
    frozen("files.json", "config.yaml", list(settings))
    assert settings == stored("checkpoint_final.pth")["mim_config"]


def test_case_index(small_run, frozen):
    folder = small_run.folder / "nnUNet_preprocessed" / "Dataset901_Labelled" / "mim_case_index"
    with np.load(folder / "nnUNetPlans_3d_fullres.npz") as index:
        found = {name: [str(index[name].dtype), list(index[name].shape)] for name in index.files}
    frozen("files.json", "case index", found)


def test_plans_of_mim_plan(work, command, frozen):
    settings = ("--set", "num_epochs=2", "iterations_per_epoch=2")
    assert command("mim_plan", "-d", "901", "--preset", "tiny", *settings) == 0
    plans = json.loads((work / "nnUNet_preprocessed/Dataset901_Labelled/nnUNetMiMPlans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] == CLASS_PATH
    frozen("files.json", "plans of mim_plan", plans)


def test_plans_of_mim_plan_with_a_checkpoint(work, command, small_run, frozen):
    path = small_run.run / "checkpoint_final.pth"
    assert command("mim_plan", "-d", "901", "-pc", path, "-o", "pretrainedPlans") == 0
    plans = json.loads((work / "nnUNet_preprocessed/Dataset901_Labelled/pretrainedPlans.json").read_text())
    assert plans["pretrain_info"].pop("checkpoint_path") == str(path)
    frozen("files.json", "plans of mim_plan -pc", plans)


def test_files_of_an_export(work, command, small_run, frozen):
    arguments = ("-o", "export", "--licence", "cc0-1.0", "--data", "made-up cases")
    assert command("mim_export", small_run.run / "checkpoint_final.pth", *arguments) == 0
    frozen("files.json", "files of mim_export", files_below(work / "export"))
    frozen("files.json", "config.json of mim_export", structure(json.loads((work / "export/config.json").read_text())))
