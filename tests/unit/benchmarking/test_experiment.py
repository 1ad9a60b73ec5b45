"""Planning an experiment: estimates, states and devices."""

import json
from types import SimpleNamespace

import pytest
import torch

from nnunet_mim.benchmarking import experiment
from nnunet_mim.benchmarking.bench_file import ArmSpec, Bench, DatasetSpec
from nnunet_mim.benchmarking.cell import Arm, Cell, Length
from nnunet_mim.benchmarking.experiment import (
    _check_references,
    _hours_of,
    _median_seconds,
    check_device,
    measure,
    prepare,
    run_experiment,
    summary_of_plan,
    views,
)
from nnunet_mim.benchmarking.matrix import Matrix, Place
from nnunet_mim.benchmarking.outcome import Outcome
from nnunet_mim.errors import MiMError

LENGTH = Length(10, 20, 3)


def source_of(patch=(16, 16, 16), recipe=None):
    """Plans of a small plain U-Net of nnU-Net."""
    stages = {"n_stages": 2, "features_per_stage": [4, 8], "kernel_sizes": [[3] * 3] * 2,
              "strides": [[1] * 3, [2] * 3], "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1],
              "conv_op": "torch.nn.modules.conv.Conv3d", "conv_bias": True,
              "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {}, "dropout_op": None,
              "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {}}  # fmt: skip
    configuration = {
        "patch_size": list(patch), "batch_size": 2, "median_image_size_in_voxels": [32.0, 16.0, 16.0],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": stages, "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }  # fmt: skip
    plans = {"configurations": {"3d_fullres": configuration}, "label_manager": "LabelManager",
             "transpose_forward": [0, 1, 2], "mim_finetune": recipe or {}}  # fmt: skip
    facts = {"configuration": "3d_fullres", "in_channels": 1, "plans_name": "P", "dataset": "D"}
    return SimpleNamespace(plans=plans, plans_file="D/P.json", **facts)


def cell_of(trainer="nnUNetTrainer", settings=None, source=None):
    spec = ArmSpec("A", trainer, settings=settings or {})
    return Cell(Arm(spec, source or source_of()), 0, ("t",), ("v", "w"), 0, LENGTH)


def test_an_estimate_counts_steps_patches_and_mirrored_views(monkeypatch):
    """Two cases of 32 × 16 × 16 in patches of 16³ at half overlap: 3 each, 8 views; 10 epochs of 20 steps and 3 · 2
    patches.
    """
    calls = []

    def seconds(network, shape, device, train):
        calls.append((tuple(shape), train))
        return 10.0 if train else 1.0

    monkeypatch.setattr("nnunet_mim.benchmarking.experiment._median_seconds", seconds)
    cell = cell_of()
    cell.__dict__["dataset_json"] = {"labels": {"background": 0, "x": 1}}
    total = measure(cell, "cpu")
    assert calls == [((2, 1, 16, 16, 16), True), ((1, 1, 16, 16, 16), False)]
    assert total == 10 * (20 * 10.0 + 3 * 2 * 1.0) + 2 * 3 * 8 * 1.0


@pytest.mark.parametrize("place", ["network_class_name", "conv_op"])
def test_nothing_that_plans_name_is_run_for_an_estimate(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "canary.py").write_text("open('sung', 'w').close()\ndef Net(*_, **__): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = source_of()
    architecture = source.plans["configurations"]["3d_fullres"]["architecture"]
    (architecture if place == "network_class_name" else architecture["arch_kwargs"])[place] = "canary.Net"
    cell = cell_of(source=source)
    cell.__dict__["dataset_json"] = {"labels": {"background": 0, "x": 1}}
    with pytest.raises(MiMError, match=r"^D/P\.json: the architecture names 'canary\.Net'"):
        measure(cell, "cpu")
    assert not (tmp_path / "sung").exists()


def test_views_are_those_of_the_recipe():
    mim = "nnUNetTrainerMiM"
    assert [views(cell_of(mim)), views(cell_of(mim, {"mirror_axes": []})), views(cell_of())] == [4, 1, 8]
    assert views(cell_of(mim, source=source_of(recipe={"mirror_axes": [0]}))) == 2


def test_real_steps_take_time():
    network = torch.nn.Conv3d(1, 2, 3)
    assert 0 < _median_seconds(network, (1, 1, 8, 8, 8), "cpu", True) < 5
    assert network.weight.grad is None


def test_hours_come_from_finished_trainings_before_measuring(monkeypatch, tmp_path, capsys):
    specs = (ArmSpec("A", "nnUNetTrainer", "P"), ArmSpec("B", "nnUNetTrainer", "Q"))
    bench = Bench((DatasetSpec("D"),), specs, ("1", "2"), 2, output=tmp_path)
    cells = {Place("D", 0, n, s, spec.name): cell_of() for spec in specs for n in bench.labels for s in (0, 1)}
    results = {
        Place("D", 0, labels, 0, "A"): {"cost": {"seconds": seconds}} for labels, seconds in (("1", 3600), ("2", 7200))
    }
    matrix = Matrix(bench, cells, "A")
    monkeypatch.setattr(experiment, "measure", lambda cell, device: 1800.0)
    assert _hours_of(matrix, results) == {("D", "A"): 1.5, ("D", "B"): 0.5}

    def fails(*_):
        raise RuntimeError("no such network")

    monkeypatch.setattr(experiment, "measure", fails)
    assert _hours_of(matrix, results) == {("D", "A"): 1.5, ("D", "B"): None}
    assert "no estimate for A (RuntimeError: no such network)" in capsys.readouterr().out


DESCRIPTION = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}


@pytest.mark.parametrize("change", [{"labels": ["x"]}, {"file_ending": "../.nii.gz"}, {"channel_names": []}], ids=str)
def test_a_dataset_json_that_was_changed_is_named(tmp_path, change):
    source = SimpleNamespace(dataset="Dataset501_X", plans_name="P", configuration="3d_fullres", folder=tmp_path / "P")
    (tmp_path / "dataset.json").write_text(json.dumps({**DESCRIPTION, **change}))
    with pytest.raises(MiMError, match=rf"dataset\.json: {next(iter(change))}"):
        cell_of(source=source).reference("a")


def test_a_missing_reference_is_noticed_before_any_training(tmp_path):
    source = SimpleNamespace(dataset="Dataset501_X", plans_name="P", configuration="3d_fullres", folder=tmp_path / "P")
    source.preprocess_command = "nnUNetv2_preprocess -d 501 -plans_name P -c 3d_fullres"
    (tmp_path / "dataset.json").write_text(json.dumps({**DESCRIPTION, "file_ending": ".nrrd"}))
    bench = Bench((DatasetSpec("D"),), (ArmSpec("A", "nnUNetTrainer", "P"),), ("1",), output=tmp_path)
    place = Place("D", 0, "1", 0, "A")
    matrix = Matrix(bench, {place: cell_of(source=source)}, "A")
    (tmp_path / "gt_segmentations").mkdir()
    (tmp_path / "gt_segmentations" / "v.nrrd").touch()
    with pytest.raises(MiMError, match=r"w\.nrrd, .* missing: run nnUNetv2_preprocess -d 501 -plans_name P -c 3d_full"):
        _check_references(matrix, {})
    _check_references(matrix, {place})  # its result is there: nothing is compared any more
    (tmp_path / "gt_segmentations" / "w.nrrd").touch()
    _check_references(matrix, {})


def test_references_are_looked_for_before_seen_cases_and_not_for_a_report(monkeypatch, tmp_path):
    """To look for seen cases reads every validation image."""
    looked, matrix = [], SimpleNamespace(tests=())
    for name, result in (("require_environment", None), ("build_matrix", matrix), ("finished_results", {}),
                         ("_check_references", None), ("look_for_seen_cases", {})):  # fmt: skip
        monkeypatch.setattr(experiment, name, lambda *_, name=name, result=result: looked.append(name) or result)
    bench = Bench((), ())
    assert prepare(bench) == (Outcome(matrix, {}, {}), {})
    assert looked[-2:] == ["_check_references", "look_for_seen_cases"]
    looked.clear()
    prepare(bench, only_report=True)
    assert "_check_references" not in looked


@pytest.mark.parametrize(
    ("retry", "broken", "says"),
    [
        (True, True, "1 trainings failed, D fold 0, .*, A first: see above, and repeat the command"),
        (False, True, "1 trainings failed, D fold 0, .*, A first: see above, and repeat the command with --retry"),
        (False, False, "1 trainings were interrupted, D fold 0, .*, A first: see above, and repeat the command"),
    ],
)
def test_what_failed_and_how_to_go_on(monkeypatch, tmp_path, retry, broken, says):
    bench = Bench((DatasetSpec("D"),), (ArmSpec("A", "nnUNetTrainer", "P"),), ("1",), device="cpu", output=tmp_path)
    place = Place("D", 0, "1", 0, "A")
    matrix = Matrix(bench, {place: cell_of()}, "A")
    after = [{}, {place: "no memory"} if broken else {}]
    monkeypatch.setattr(experiment, "prepare", lambda _: (Outcome(matrix, {}, {}), {}))
    monkeypatch.setattr(experiment, "failures", lambda _: after.pop(0))
    monkeypatch.setattr(experiment, "run_matrix", lambda *_: {place: "why"})
    with pytest.raises(MiMError, match=f"{says}$"):
        run_experiment(bench, retry)


def test_the_experiment_as_text_is_kept_once_it_is_checked(monkeypatch, tmp_path):
    bench = Bench((DatasetSpec("D"),), (ArmSpec("A", "nnUNetTrainer", "P"),), device="cpu", output=tmp_path / "out")

    def refuse(_):
        raise MiMError("no such dataset")

    monkeypatch.setattr(experiment, "prepare", refuse)
    with pytest.raises(MiMError, match="no such dataset"):
        run_experiment(bench, bench_yaml="seeds: 1")
    assert not bench.output.exists()
    monkeypatch.setattr(experiment, "prepare", lambda _: (Outcome(Matrix(bench, {}, "A"), {}, {}), {}))
    run_experiment(bench, bench_yaml="seeds: 1")
    assert (bench.output / "bench.yaml").read_text() == "seeds: 1"


def test_gpus_that_are_not_there(monkeypatch, tmp_path):
    bench = Bench((), (), gpus=("0", "3"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(MiMError, match="no GPU was found: give device cpu"):
        check_device(bench)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MiMError, match="gpus: 3: 2 can be seen here, numbered from 0"):
        check_device(bench)
    check_device(Bench((), (), device="cpu"))
    check_device(Bench((), (), gpus=(), slurm={}))


def test_the_summary_of_a_plan_gives_no_hours_that_nobody_knows():
    assert summary_of_plan([1.0, 0.25], 4, "cuda", 1) == "2 of 4 trainings to do, about 1.2 h of cuda"
    assert summary_of_plan([1.0, None, None], 3, "cpu", 2) == (
        "3 of 3 trainings to do, about 1.0 h of cpu; 2 at a time (2 not counted)"
    )
    assert summary_of_plan([None, None], 2, "cuda", 1) == "2 of 2 trainings to do, hours unknown"
    assert summary_of_plan([], 5, "cuda", 4) == "0 of 5 trainings to do"
