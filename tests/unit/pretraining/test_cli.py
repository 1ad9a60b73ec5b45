"""`mim_pretrain`: whole small runs, and every bad input."""

import csv
import json

import numpy as np
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.checkpoint.identity import voxel_sha256
from nnunet_mim.config import PretrainConfig
from nnunet_mim.nnunet.source import find_source
from nnunet_mim.nnunet.splits import fold_validation_cases
from nnunet_mim.pretraining import cli, loop
from nnunet_mim.pretraining import setup as runs
from nnunet_mim.pretraining.data import case_index

SMALL = ["-p", "tinyPlans", "--preset", "tiny", "--view", "32", "--scale", "2", "2", "2", "-device", "cpu",
         "--batch", "1", "--workers", "0", "--children", "2", "1"]  # fmt: skip


def run(*args):
    return cli.main(["-d", "900", *SMALL, *args])


def refused(capsys, *args):
    """The one-line error of a command that must fail."""
    assert cli.main(list(args)) == 2
    *progress, message = capsys.readouterr().err.strip().split("\n")
    assert message.startswith("error: ")
    assert not any("Traceback" in line for line in progress)
    return message


def fold_folder(tmp_path, fold="0", tag=""):
    return tmp_path / "results" / "Dataset900_Tiny" / f"MiMPretrain{tag}__tinyPlans__3d_fullres" / f"fold_{fold}"


def test_a_small_run_writes_the_checkpoint_of_the_contract(write_dataset, tmp_path, capsys):
    folder = write_dataset(n=6)
    assert run("-f", "0", "--iterations", "3", "--val_every", "2") == 0
    output = fold_folder(tmp_path)
    assert {p.name for p in output.iterdir()} == {
        "checkpoint_best.pth", "checkpoint_final.pth", "config.yaml", "progress.png", "report.html", "train.csv",
        "val.csv", "tensorboard",
    }  # fmt: skip
    checkpoint = load_checkpoint(output / "checkpoint_final.pth")

    assert {"network_weights", "nnssl_adaptation_plan", "mim_config", "mim_version", "provenance"} == set(checkpoint)
    assert set(checkpoint["nnssl_adaptation_plan"]) == {
        "architecture_plans", "pretrain_plan", "pretrain_num_input_channels", "recommended_downstream_patchsize",
        "key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe", "citations",
    }  # fmt: skip
    block = checkpoint["nnssl_adaptation_plan"]["architecture_plans"]
    kwargs, needs = block["arch_kwargs"], block["arch_kwargs_requiring_import"]
    network = get_network_from_plans(block["arch_class_name"], kwargs, needs, 1, 2, deep_supervision=False)
    weights = {n: w for n, w in checkpoint["network_weights"].items() if n.startswith("encoder.")}
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not any(name.startswith("encoder.") for name in missing)
    assert {name.split(".")[0] for name in checkpoint["network_weights"]} == {"encoder", "decoder", "projectors"}
    config = PretrainConfig.from_dict(checkpoint["mim_config"])
    assert config.view_size == (32, 32, 32)
    assert config.iterations == 3

    provenance = checkpoint["provenance"]
    assert provenance["iterations"] == 3
    assert provenance["fold"] == 0
    assert [row["iteration"] for row in provenance["loss_history"]] == [0, 2, 3]
    source = find_source("900", "tinyPlans", "3d_fullres")
    held_out = fold_validation_cases(source, 0)
    assert held_out, "the fold must hold something out"
    assert {c["case"] for c in provenance["cases"]} == set(source.cases) - set(held_out)
    for entry in provenance["cases"]:
        voxels = source.dataset_class(str(folder), [entry["case"]]).load_case(entry["case"])[0][:]
        assert entry["sha256"] == voxel_sha256(np.asarray(voxels))

    with (output / "val.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["0", "2", "3"]
    assert float(rows[0]["baseline/level3/token_mean"]) == pytest.approx(1, abs=0.01)
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    name = "val/level3/reconstruction"
    curve = [(event.step, event.value) for event in events.Scalars(name)]
    assert curve == [(int(row["iteration"]), pytest.approx(float(row[name]), rel=1e-5)) for row in rows]
    printed = capsys.readouterr().out
    assert "2 views a crop of (16, 16, 16) voxels, seen as (32, 32, 32): 4 of 8 tokens visible" in printed
    assert "nnUNetv2_train" in printed


def test_folds_of_nnunet_are_respected(write_dataset, tmp_path):
    folder = write_dataset(n=6)
    splits = [{"train": [f"case_{i:02d}" for i in range(6) if i != k], "val": [f"case_{k:02d}"]} for k in range(5)]
    (folder.parent / "splits_final.json").write_text(json.dumps(splits))
    assert run("-f", "3", "--iterations", "1") == 0
    cases = load_checkpoint(fold_folder(tmp_path, "3") / "checkpoint_final.pth")["provenance"]["cases"]
    assert [c["case"] for c in cases] == ["case_00", "case_01", "case_02", "case_04", "case_05"]


def test_a_renamed_copy_of_a_held_out_case_is_not_trained_on(write_dataset, save_case, tmp_path):
    folder = write_dataset(n=6)
    splits = [{"train": ["case_01"], "val": ["case_00"]}]
    (folder.parent / "splits_final.json").write_text(json.dumps(splits))
    source = find_source("900", "tinyPlans", "3d_fullres")
    copy = np.asarray(source.dataset_class(str(folder), ["case_00"]).load_case("case_00")[0][:])
    save_case(folder, "case_99", copy)
    assert run("-f", "0", "--iterations", "1") == 0
    cases = load_checkpoint(fold_folder(tmp_path) / "checkpoint_final.pth")["provenance"]["cases"]
    assert {c["case"] for c in cases} == {f"case_{i:02d}" for i in range(1, 6)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu_is_continued(write_dataset, interrupted_run, tmp_path):
    """The optimiser's state follows the parameters to the device. (Sums there depend on the order of threads.)"""
    write_dataset(n=4)
    common = ("-device", "cuda", "--iterations", "6", "--save_every", "2", "--val_every", "3")
    interrupted_run(*common, after=5)
    assert run(*common, "--c") == 0
    history = load_checkpoint(fold_folder(tmp_path, "all") / "checkpoint_final.pth")["provenance"]["loss_history"]
    assert [row["iteration"] for row in history] == [0, 3, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_recorded_steps_equal_ordinary_ones(write_dataset, tmp_path):
    """In float32, with a learning rate that changes; sums on a GPU depend on the order of threads."""
    write_dataset(n=4)
    rows, weights = {}, {}
    for way in ("--record", "--no-record"):
        common = ("-device", "cuda", "--precision", "32-true", "--iterations", "12", "--val_every", "3", "--lr", "1e-3")
        assert run(*common, way, "-o", way.strip("-")) == 0
        checkpoint = load_checkpoint(fold_folder(tmp_path, "all", f"_{way.strip('-')}") / "checkpoint_final.pth")
        rows[way], weights[way] = checkpoint["provenance"]["loss_history"], checkpoint["network_weights"]
    for recorded, ordinary in zip(rows["--record"], rows["--no-record"], strict=True):
        assert recorded == pytest.approx(ordinary, rel=5e-3, abs=1e-3, nan_ok=True)
    moved = [
        float((weights["--record"][n] - w).norm() / w.norm().clamp(min=1e-3)) for n, w in weights["--no-record"].items()
    ]
    assert max(moved) < 0.05


def test_volumes_smaller_than_the_view_are_padded(write_dataset, tmp_path):
    write_dataset(n=4, shape=(24, 40, 40))
    assert run("--iterations", "2", "--view", "64", "64", "64", "--scale", "1", "1", "1") == 0
    history = load_checkpoint(fold_folder(tmp_path, "all") / "checkpoint_final.pth")["provenance"]["loss_history"]
    assert history[-1]["val/level3/padded_share"] < history[-1]["val/level2/padded_share"] <= 1
    assert all(np.isfinite(value) for value in history[-1].values())


def test_two_datasets_in_one_run_and_fold_only_of_the_labelled(write_dataset, tmp_path):
    write_dataset(n=5, number=900)
    write_dataset(n=3, number=950, labelled=False)
    assert cli.main(["-d", "900", "950", *SMALL, "-f", "0", "--iterations", "1"]) == 0
    cases = load_checkpoint(fold_folder(tmp_path) / "checkpoint_final.pth")["provenance"]["cases"]
    assert sum(c["dataset"] == "Dataset900_Tiny" for c in cases) == 4
    assert sum(c["dataset"] == "Dataset950_Tiny" for c in cases) == 2, "one of three is held out"


@pytest.mark.parametrize("options", [("--ladder", "native"), ("--alignment", "cosine"), ("--alignment", "none"),
                                     ("--view", "32", "32", "64", "--scale", "1", "2", "2")])  # fmt: skip
def test_every_choice_trains(write_dataset, tmp_path, options):
    write_dataset(n=3, shape=(64, 64, 64))  # tokens of the native ladder's level 1 are that large
    assert run("--iterations", "2", *options) == 0


def test_the_loss_falls(write_dataset, tmp_path):
    write_dataset(n=3)
    assert run("--iterations", "40", "--lr", "2e-3", "--val_every", "20") == 0
    history = load_checkpoint(fold_folder(tmp_path, "all") / "checkpoint_final.pth")["provenance"]["loss_history"]
    assert history[-1]["val/loss"] < 0.93 * history[0]["val/loss"]


def test_a_run_from_an_earlier_ones_weights_remembers_its_cases(write_dataset, tmp_path, capsys):
    write_dataset(n=3, number=901)
    write_dataset(n=3, number=900)
    assert cli.main(["-d", "901", *SMALL, "--iterations", "1", "--lr", "1e-9"]) == 0
    earlier = tmp_path / "results/Dataset901_Tiny/MiMPretrain__tinyPlans__3d_fullres/fold_all/checkpoint_final.pth"
    assert run("--iterations", "1", "--lr", "1e-9", "--init", str(earlier), "--seed", "5") == 0
    first, second = (load_checkpoint(path) for path in (earlier, fold_folder(tmp_path, "all") / earlier.name))
    for name, value in first["network_weights"].items():
        torch.testing.assert_close(second["network_weights"][name], value, rtol=0, atol=1e-6)
    datasets = [case["dataset"] for case in second["provenance"]["cases"]]
    assert datasets == ["Dataset901_Tiny"] * 2 + ["Dataset900_Tiny"] * 2
    small = [a if a != "tiny" else "small" for a in SMALL]
    assert "not that of this run" in refused(capsys, "-d", "900", *small, "-o", "other", "--init", str(earlier))
    other = ("-o", "other", "--init", str(earlier), "--alignment", "cosine")
    assert "alignment infonce and strides [[2, 2, 2]" in refused(capsys, "-d", "900", *SMALL, *other)
    assert "no.pth does not exist" in refused(
        capsys, "-d", "900", *SMALL, "-o", "other", "--init", str(tmp_path / "no.pth")
    )


# --- bad input: one line, before any long work -----------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["nnUNet_results", "nnUNet_preprocessed"])
def test_nnunet_variables_not_set(write_dataset, monkeypatch, capsys, variable):
    write_dataset(n=2)
    monkeypatch.delenv(variable)
    assert f"{variable} is not set" in refused(capsys, "-d", "900", *SMALL)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("-d", "999", *SMALL), "unknown dataset '999'"),
        (("-d", "Dataset999_Typo", *SMALL), "unknown dataset 'Dataset999_Typo'"),
        (("-d", "900", *SMALL, "--seed", "-1"), "--seed must be 0 or more"),
        (("-d", "900", *SMALL, "--compile"), "--compile is for a GPU"),
        (("-d", "900", *SMALL, "--mirror_axes", "3"), "--mirror_axes takes array axes 0, 1 and 2"),
        (("-d", "900", *SMALL, "--mirror_axes", "-1"), "--mirror_axes takes array axes 0, 1 and 2"),
        (("-d", "900", *SMALL, "-p", "noPlans"), "no plans 'noPlans'"),
        (("-d", "900", *SMALL, "-c", "3d_lowres"), "choose one with -c (2d, 3d_fullres, other)"),
        (("-d", "900", *SMALL, "-c", "2d"), "2-D"),
        (("-d", "900", *SMALL, "-c", "other"), "nnUNetv2_preprocess -d 900 -plans_name tinyPlans -c other"),
        (("-d", "900", *SMALL, "--c"), "nothing to continue"),
        (("-d", "900", *SMALL, "--view", "40"), "multiple of twice the token size"),
        (("-d", "900", *SMALL, "--view", "64", "64"), "one number or three"),
        (("-d", "900", *SMALL, "--scale", "3", "2", "2"), "--scale must be 1 or 2"),
        (("-d", "900", *SMALL, "--mask_ratios", "0.5", "1", "0.5"), "mask ratio"),
        (("-d", "900", *SMALL, "--iterations", "0"), "iterations must be at least 1"),
        (("-d", "900", *SMALL, "--lr", "0"), "learning_rate"),
        (("-d", "900", *SMALL, "-f", "x"), "-f takes 'all' or a fold number"),
        (("-d", "900", *SMALL, "-o", "../../x"), "-o ../../x: a tag takes letters"),
        (("-d", "900", *SMALL, "-o", "a\0b"), "a tag takes letters"),
        (("-d", "900", *SMALL, "-f", "7"), "fold 7 does not exist"),
    ],
)
def test_bad_arguments(write_dataset, capsys, tmp_path, args, says):
    write_dataset(n=5)
    assert says in refused(capsys, *args)
    assert not (tmp_path / "results").exists(), "nothing may have been written"


def test_a_fold_is_checked_before_any_case_is_read(write_dataset, capsys, monkeypatch):
    write_dataset(n=5)
    monkeypatch.setattr(runs, "index_sources", lambda *_: pytest.fail("read cases before looking at the fold"))
    assert "fold 7 does not exist" in refused(capsys, "-d", "900", *SMALL, "-f", "7")


def test_too_few_cases_for_a_fold(write_dataset, capsys):
    write_dataset(n=4)
    assert "too few for nnU-Net's 5 folds" in refused(capsys, "-d", "900", *SMALL, "-f", "0")


@pytest.mark.parametrize("name", ["tinyPlans.json", "splits_final.json"])
def test_a_broken_json_file_is_named(write_dataset, capsys, name):
    folder = write_dataset(n=5)
    (folder.parent / name).write_text('{"half": [1,')
    assert name in refused(capsys, "-d", "900", *SMALL, "-f", "0")


def test_an_ambiguous_number(write_dataset, capsys, tmp_path):
    write_dataset(n=1)
    (tmp_path / "raw" / "Dataset900_Twin").mkdir(parents=True)
    assert "ambiguous (Dataset900_Tiny, Dataset900_Twin)" in refused(capsys, "-d", "900", *SMALL)


def test_not_preprocessed_at_all(write_dataset, capsys, tmp_path):
    write_dataset(n=1)
    (tmp_path / "raw" / "Dataset905_Raw").mkdir(parents=True)
    assert "nnUNetv2_plan_and_preprocess -d 905" in refused(capsys, "-d", "905", *SMALL)


def test_no_gpu(write_dataset, capsys, monkeypatch):
    write_dataset(n=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = [a if a != "cpu" else "cuda" for a in SMALL]
    assert "-device cpu" in refused(capsys, "-d", "900", *args)


@pytest.mark.parametrize("damage", ["truncated", "empty", "nan", "channels", "vanished"])
@pytest.mark.parametrize("storage", ["b2nd", "npz"])
def test_damaged_cases_are_named_before_training(write_dataset, save_case, capsys, tmp_path, damage, storage):
    folder = write_dataset(n=3, storage=storage)
    path = folder / f"case_01.{storage}"
    shape = (1, 48, 48, 48)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "nan":
        data = np.zeros(shape)
        data[0, 5, 5, 5] = np.nan
        save_case(folder, "case_01", data, storage=storage)
    elif damage == "channels":
        save_case(folder, "case_01", np.zeros((2, *shape[1:])), storage=storage)
    elif damage == "vanished":
        (folder / "case_01.pkl").unlink()
    message = refused(capsys, "-d", "900", *SMALL, "--iterations", "1", "--strict")
    assert "case_01" in message
    assert "preprocess" in message
    assert not (tmp_path / "results").exists()
    assert cli.main(["-d", "900", *SMALL, "--iterations", "1"]) == 0
    said = capsys.readouterr().out
    assert "left out: Dataset900_Tiny case_01: " in said
    assert "1 cases are left out, 2 are used" in said
    stored = load_checkpoint(next((tmp_path / "results").rglob("checkpoint_final.pth")))
    assert "case_01" not in {record["case"] for record in stored["provenance"]["cases"]}


def test_no_sound_case_at_all(write_dataset, capsys, tmp_path):
    folder = write_dataset(n=2)
    for path in folder.glob("*.b2nd"):
        path.write_bytes(b"")
    assert "no case can be used: Dataset900_Tiny case_00: cannot read" in refused(capsys, "-d", "900", *SMALL)
    assert not (tmp_path / "results").exists()


def test_all_damaged_cases_are_named_and_sound_ones_are_not_read_again(write_dataset, capsys, monkeypatch):
    folder = write_dataset(n=4)
    for case in ("case_01", "case_03"):
        (folder / f"{case}.b2nd").write_bytes(b"")
    message = refused(capsys, "-d", "900", *SMALL, "--strict")
    assert "case_01.b2nd" in message
    assert "1 more cases cannot be used: Dataset900_Tiny case_03" in message
    described = []
    original = case_index._describe_case
    monkeypatch.setattr(case_index, "_describe_case", lambda s, case: described.append(case) or original(s, case))
    refused(capsys, "-d", "900", *SMALL, "--strict")
    assert sorted(described) == ["case_01", "case_03"]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_case_that_breaks_during_training_ends_the_run_with_one_line(
    write_dataset, capsys, monkeypatch, tmp_path, workers
):
    folder = write_dataset(n=2)

    def break_cases(*args, **kwargs):
        for path in folder.glob("*.b2nd"):
            path.write_bytes(b"no blosc")
        return original(*args, **kwargs)

    original = loop.training_batches
    monkeypatch.setattr(loop, "training_batches", break_cases)
    message = refused(capsys, "-d", "900", *SMALL, "--iterations", "2", "--workers", workers)
    assert message.startswith(f"error: 20 cases in a row cannot be read; cannot read {folder}")


def test_datasets_with_other_axes_are_refused(write_dataset, capsys):
    write_dataset(n=2, number=900)
    folder = write_dataset(n=2, number=901)
    plans = json.loads((folder.parent / "tinyPlans.json").read_text())
    plans["transpose_forward"] = [1, 0, 2]
    (folder.parent / "tinyPlans.json").write_text(json.dumps(plans))
    assert "order of axes" in refused(capsys, "-d", "900", "901", *SMALL)


def test_datasets_in_other_units_are_refused(write_dataset, capsys):
    write_dataset(n=2, number=900)
    write_dataset(n=2, number=901, spacing=(3.0, 3.0, 4.0))
    write_dataset(n=2, number=902, window={"percentile_99_5": 200.0})
    assert "mim_prepare -d 900 901 -s 3 3 3" in refused(capsys, "-d", "900", "901", *SMALL)
    assert "Dataset902_Tiny" in refused(capsys, "-d", "900", "902", *SMALL)


def test_a_narrow_window_is_warned_of(write_dataset, capsys):
    write_dataset(n=2, window={"percentile_00_5": -100.0, "percentile_99_5": 160.0})
    assert run("--iterations", "1") == 0
    assert "clip CT to -100 … 160 HU" in capsys.readouterr().out


def test_another_run_in_the_folder_is_never_overwritten(write_dataset, capsys, tmp_path):
    write_dataset(n=2)
    assert run("--iterations", "1") == 0
    before = (fold_folder(tmp_path, "all") / "checkpoint_final.pth").read_bytes()
    assert "holds another, finished run" in refused(capsys, "-d", "900", *SMALL, "--iterations", "1")
    assert run("--iterations", "1", "--c") == 0
    assert "finished already" in capsys.readouterr().out
    assert (fold_folder(tmp_path, "all") / "checkpoint_final.pth").read_bytes() == before
    assert run("--iterations", "1", "-o", "second") == 0


def test_continuing_with_other_settings_is_refused_with_the_difference(write_dataset, interrupted_run, capsys):
    write_dataset(n=2)
    interrupted_run("--iterations", "3", "--save_every", "1", after=2)
    message = refused(capsys, "-d", "900", *SMALL, "--iterations", "5", "--save_every", "1", "--c")
    assert "iterations 3 -> 5" in message
    assert "holds another, unfinished run" in refused(capsys, "-d", "900", *SMALL)


def test_continuing_on_other_cases_is_refused(write_dataset, interrupted_run, save_case, capsys):
    folder = write_dataset(n=3)
    write_dataset(n=2, number=901)
    interrupted_run("--iterations", "3", "--save_every", "1", after=2)
    again = ("--iterations", "3", "--save_every", "1", "--c")
    assert "started on other cases" in refused(capsys, "-d", "900", "901", *SMALL, *again)
    for number in range(3):
        save_case(folder, f"case_{number:02d}", np.random.default_rng(number).normal(size=(1, 48, 48, 48)))
    assert "2 came, went or changed" in refused(capsys, "-d", "900", *SMALL, *again)
