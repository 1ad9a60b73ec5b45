"""Trainings without any training: what decides that one is finished, and the commands that are run."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunet_mim.benchmarking import training as module
from nnunet_mim.benchmarking.bench_file import ArmSpec
from nnunet_mim.benchmarking.cell import Arm, Cell
from nnunet_mim.benchmarking.seeded_training import Length, _record_cost, _save_whole, _set_length, installed_command
from nnunet_mim.benchmarking.training import (
    KEY,
    RESULT,
    InterruptedTrainingError,
    Training,
    _total_cost,
    learning_curve,
)
from nnunet_mim.errors import MiMError


@pytest.fixture
def source(tmp_path):
    """A preprocessed dataset, as far as cells look at it."""
    base = tmp_path / "preprocessed" / "Dataset001_X"
    (base / "P_3d").mkdir(parents=True)
    (base / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}))
    return SimpleNamespace(
        dataset="Dataset001_X", plans_name="P", configuration="3d_fullres", folder=base / "P_3d", plans={"x": 1}
    )


@pytest.fixture
def make_cell(source, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"weights")

    def make(trainer="nnUNetTrainerMiM", checkpoint="a.pth", settings=None, nnssl_plans=None, **changes):
        spec = ArmSpec("A", trainer, settings=settings or {}, nnssl_plans=nnssl_plans)
        arm = Arm(spec, source, str(tmp_path / checkpoint) if checkpoint else None)
        values = {"fold": 1, "train_cases": ("a", "b"), "val_cases": ("c",), "seed": 7, "length": Length(3, 4, 5)}
        return Cell(arm, **{**values, **changes})

    return make


class Commands:
    """Takes the place of starting processes: notes commands, trains nothing."""

    def __init__(self, returns=1):
        self.commands, self.environments, self.returns = [], [], returns

    def __call__(self, command, log, environment, stop):
        self.commands.append([str(word) for word in command])
        self.environments.append(environment)
        log.write_text("an error of nnU-Net")
        return self.returns


@pytest.fixture
def commands(monkeypatch):
    fake = Commands()
    monkeypatch.setattr(module, "run_command", fake)
    return fake


def attempt(cell, folder, says="an error of nnU-Net"):
    folder.mkdir(exist_ok=True)
    with pytest.raises(MiMError, match=says):
        training(cell, folder).train()


def training(cell, folder, tolerance=1.0):
    return Training(cell, folder, "cpu", tolerance, threads=1)


def test_the_command_and_its_folders(make_cell, commands, tmp_path):
    folder = tmp_path / "cell"
    attempt(make_cell(), folder)
    (command,), (env,) = commands.commands, commands.environments
    assert command[2:] == [
        "nnunet_mim.benchmarking.seeded_training", str(os.getpid()), "7", "3", "4", "5", "1",
        str(folder / "cost.json"), "nnUNetv2_train",
        "Dataset001_X", "3d_fullres", "1", "-tr", "nnUNetTrainerMiM", "-p", "P", "-device", "cpu",
    ]  # fmt: skip
    assert env["nnUNet_mim_checkpoint"] == str(tmp_path / "a.pth")
    base = folder / "nnUNet_preprocessed" / "Dataset001_X"
    assert json.loads((base / "splits_final.json").read_text())[1] == {"train": ["a", "b"], "val": ["c"]}
    assert (base / "P_3d").resolve() == tmp_path / "preprocessed" / "Dataset001_X" / "P_3d"
    recipe = json.loads((base / "P.json").read_text())["mim_finetune"]
    assert (recipe["num_epochs"], recipe["iterations_per_epoch"], recipe["val_iterations_per_epoch"]) == (3, 4, 5)


def test_a_checkpoint_for_a_trainer_of_nnunet(make_cell, commands, tmp_path):
    cell, folder = make_cell("nnUNetTrainer"), tmp_path / "cell"
    attempt(cell, folder)
    assert commands.commands[0][-2:] == ["-pretrained_weights", str(tmp_path / "a.pth")]
    assert "nnUNet_mim_checkpoint" not in commands.environments[0]
    output = folder / "nnUNet_results" / "Dataset001_X" / "nnUNetTrainer__P__3d_fullres" / "fold_1"
    output.mkdir(parents=True)
    for name, option in (("checkpoint_latest.pth", "--c"), ("checkpoint_final.pth", "--val")):
        (output / name).touch()
        attempt(cell, folder)
        assert commands.commands[-1][-1] == option
        assert "-pretrained_weights" not in commands.commands[-1]


def test_an_interrupted_cell_is_not_continued_as_another_one(make_cell, commands, tmp_path):
    folder = tmp_path / "cell"
    attempt(make_cell(), folder)
    assert training(make_cell(), folder).finished() is None
    for changes, says in (
        ({"length": Length(9, 4, 5)}, "length"),
        ({"settings": {"lr": 0.1}}, "settings"),
        ({"train_cases": ("a",)}, "train_cases"),
    ):
        with pytest.raises(MiMError, match=f"holds another experiment .{says}"):
            training(make_cell(**changes), folder).finished()
    (tmp_path / "a.pth").write_bytes(b"other weights under the same name")
    with pytest.raises(MiMError, match=r"holds another experiment \(checkpoint_sha256"):
        training(make_cell(), folder).finished()


def test_plans_of_the_same_name_but_other_content(make_cell, source, commands, tmp_path):
    folder = tmp_path / "cell"
    attempt(make_cell(), folder)
    source.plans = {"x": 2}
    with pytest.raises(MiMError, match=r"holds another experiment \(plans_sha256"):
        training(make_cell(), folder).finished()


KEPT = {
    "cases": {"c": {"1": {"dice": 0.5, "hd95": 2.0, "nsd": 0.5, "n_ref": 3, "n_pred": 2}}}, "curve": [0.1, 0.2],
    "names": {"1": "organ"}, "tolerance": 1.0,
    "cost": {"began": 1.0, "seconds": 5.0, "peak_bytes": 7, "parameters": 9, "device": "cpu"},
}  # fmt: skip
"""result.json"""


def test_a_finished_cell(make_cell, tmp_path):
    folder = tmp_path / "cell"
    folder.mkdir()
    assert training(make_cell(), folder).finished() is None
    (folder / KEY).write_text(json.dumps(make_cell().key()))
    (folder / RESULT).write_text(json.dumps(KEPT))
    assert training(make_cell(), folder).finished() == KEPT


def test_another_tolerance_measures_the_predictions_again(make_cell, tmp_path, monkeypatch):
    folder = tmp_path / "cell"
    folder.mkdir()
    (folder / KEY).write_text(json.dumps(make_cell().key()))
    (folder / RESULT).write_text(json.dumps(KEPT))
    monkeypatch.setattr(Training, "measured", lambda self: {"cases": 2, "tolerance": self.tolerance})
    expected = {**KEPT, "cases": 2, "tolerance": 3.0}
    assert training(make_cell(), folder, 3.0).finished() == expected
    assert json.loads((folder / RESULT).read_text()) == expected


def test_a_failure_is_remembered_until_the_next_attempt(make_cell, commands, tmp_path, monkeypatch):
    folder = tmp_path / "cell"
    again = training(make_cell(), folder)
    assert again.failure() is None
    attempt(make_cell(), folder)
    assert again.failure().startswith("training failed, see")
    monkeypatch.setattr(module, "run_command", lambda *_: pytest.fail(again.failure() or "forgotten"))
    with pytest.raises(pytest.fail.Exception, match="forgotten"):
        again.train()


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT])
def test_what_was_ended_from_outside_has_not_failed(make_cell, commands, tmp_path, ended_by):
    commands.returns = -ended_by
    with pytest.raises(InterruptedTrainingError):
        training(make_cell(), tmp_path / "cell").train()
    assert training(make_cell(), tmp_path / "cell").failure() is None


def test_a_training_is_ended_with_all_its_processes(tmp_path):
    """A shell that starts another process, as nnU-Net does; both are gone within a second or two."""
    stop = threading.Event()
    threading.Timer(0.7, stop.set).start()
    command = ["bash", "-c", "sleep 61 & echo $!; wait"]
    returned = module.run_command(command, tmp_path / "log", dict(os.environ), stop)
    assert returned == -signal.SIGTERM
    child = int((tmp_path / "log").read_text())
    end = time.monotonic() + 5
    while _runs(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(child)
    assert module.run_command(["bash", "-c", "exit 3"], tmp_path / "log", dict(os.environ), None) == 3


def _runs(process):
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


def test_a_checkpoint_that_has_moved_is_the_same(make_cell, commands, tmp_path):
    attempt(make_cell(), tmp_path / "cell")
    (tmp_path / "a.pth").rename(tmp_path / "b.pth")
    assert training(make_cell(checkpoint="b.pth"), tmp_path / "cell").finished() is None


def test_checkpoints_are_written_whole_or_not_at_all(tmp_path):
    class Trainer:
        def save_checkpoint(self, filename):
            Path(filename).write_text("half")
            if self.dies:
                raise KeyboardInterrupt
            Path(filename).write_text("whole")

    _save_whole(Trainer)
    trainer, file = Trainer(), tmp_path / "checkpoint_latest.pth"
    trainer.dies = False
    trainer.save_checkpoint(str(file))
    assert file.read_text() == "whole"
    trainer.dies = True
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(str(file))
    assert file.read_text() == "whole"


def test_one_gpu_a_training(make_cell, commands, tmp_path):
    with pytest.raises(MiMError):
        Training(make_cell(), tmp_path / "cell", "cuda", 1.0).train(gpu="3")
    assert commands.environments[0]["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(("threads", "given", "expected"), [(2, None, "2"), (2, "5", "5"), (0, None, None)])
def test_as_many_processes_write_predictions_as_a_training_has_threads(
    make_cell, tmp_path, monkeypatch, threads, given, expected
):
    """nnU-Net's eight take longer to start than a short training on a few cores; what the user sets stays."""
    monkeypatch.delenv("nnUNet_def_n_proc", raising=False)
    if given:
        monkeypatch.setenv("nnUNet_def_n_proc", given)
    made = Training(make_cell(), tmp_path / "cell", "cpu", 1.0, threads)
    assert made.environment(None).get("nnUNet_def_n_proc") == expected


def test_another_command_takes_its_checkpoint_from_the_plans(make_cell, commands, tmp_path):
    attempt(make_cell("PretrainedTrainer", nnssl_plans="P"), tmp_path / "cell")
    command = commands.commands[0]
    assert command[9:11] == [str(tmp_path / "cell" / "cost.json"), "nnUNetv2_train_pretrained"]
    assert "-pretrained_weights" not in command


def test_the_cost_of_all_attempts(tmp_path):
    file = tmp_path / "cost.json"
    assert _total_cost(file) == {}

    class Trainer:
        device, network = torch.device("cpu"), torch.nn.Linear(3, 4)

        def on_epoch_end(self):
            return "epoch"

        def perform_actual_validation(self, save_probabilities=False):
            return save_probabilities

    for began in (time.time() - 30, time.time() - 100):
        again = type("Again", (Trainer,), {"on_epoch_end": Trainer.on_epoch_end})
        _record_cost(again, file, began)
        assert again().on_epoch_end() == "epoch"
        assert again().perform_actual_validation(True) is True
    cost = _total_cost(file)
    assert cost["seconds"] == pytest.approx(130, abs=5)
    assert (cost["parameters"], cost["device"]) == (16, "cpu")
    assert 10e6 < cost["peak_bytes"] < 100e9


def test_a_long_training_is_saved_no_less_often_than_by_nnunet_itself():
    class Trainer:
        save_every = 50

        def initialize(self):
            pass

    _set_length(Trainer, Length(1000, 250, 50))
    trainer = Trainer()
    trainer.initialize()
    assert trainer.save_every == 50


def test_an_installed_command_is_found_by_its_name():
    assert installed_command("nnUNetv2_train").value == "nnunetv2.run.run_training:run_training_entry"
    assert installed_command("nnUNetv2_nothing") is None


def test_the_length_holds_for_trainers_with_one_of_their_own():
    class Trainer:
        def __init__(self):
            self.num_epochs, self.save_every = 1000, 50

        def initialize(self):
            self.scheduled_for = self.num_epochs

    class Long(Trainer):
        def __init__(self):
            super().__init__()
            self.num_epochs = 250

    _set_length(Trainer, Length(12, 34, 56))
    trainer = Long()
    trainer.initialize()
    assert (trainer.num_epochs, trainer.scheduled_for, trainer.save_every) == (12, 12, 3)
    assert (trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (34, 56)


class Trap:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_learning_curve_is_read_without_running_what_is_in_the_file(tmp_path):
    """As nnU-Net's trainer stores it, with NumPy's numbers."""
    path = tmp_path / "checkpoint_final.pth"
    stored = {
        "network_weights": {"w": torch.ones(3)},
        "logging": {"mean_fg_dice": [np.float64(0.25), np.float32(0.5), 0.75], "epoch_start_timestamps": [1.0]},
        "_best_ema": np.float64(0.5),
        "init_args": {"device": torch.device("cpu"), "fold": 0},
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(stored, path)
    assert learning_curve(path) == [0.25, 0.5, 0.75]
    torch.save({**stored, "trainer_name": Trap(tmp_path / "trap")}, path)
    with pytest.raises(MiMError, match=r"checkpoint_final\.pth holds no learning curve"):
        learning_curve(path)
    assert not (tmp_path / "trap").exists()


def test_learning_curves_are_read_by_several_threads_at_once(tmp_path):
    """Trainings that run side by side end side by side, and PyTorch has one list of what may be read."""
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"logging": {"mean_fg_dice": [np.float32(0.5)] * 3}}, path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(learning_curve, [path] * 400)) == [[0.5] * 3] * 400
