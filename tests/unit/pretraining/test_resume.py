"""A run that ends at any moment, in any way, and is continued gives what one that was never interrupted gives."""

import json
import os
import random
import resource
import signal
import time

import pytest
import torch

from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.pretraining.stopping import EXIT_CODE

SETTINGS = ("--iterations", "24", "--save_every", "2", "--val_every", "12", "--set", "val_crops=2")


def assert_same_end(runs, one, two):
    """Weights, history and curves are equal, bit for bit."""
    ends = [load_checkpoint(runs.folder(tag) / "checkpoint_final.pth") for tag in (one, two)]
    assert list(ends[0]["network_weights"]) == list(ends[1]["network_weights"])
    for name, value in ends[0]["network_weights"].items():
        assert torch.equal(value, ends[1]["network_weights"][name]), name
    assert ends[0]["provenance"]["loss_history"] == ends[1]["provenance"]["loss_history"]
    assert runs.rows(one) == runs.rows(two)
    assert runs.rows(one, "val") == runs.rows(two, "val")
    best = [load_checkpoint(runs.folder(tag) / "checkpoint_best.pth") for tag in (one, two)]
    assert best[0]["provenance"]["iterations"] == best[1]["provenance"]["iterations"]
    assert not (runs.folder(two) / "checkpoint_latest.pth").exists()


def finish(process):
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text[-3000:]
    return text


def residual_encoder():
    """A small one of nnU-Net's plans."""
    kwargs = {
        "n_stages": 3, "features_per_stage": [4, 6, 8], "strides": [[1] * 3, [2] * 3, [4] * 3], "conv_bias": True,
        "kernel_sizes": [[3] * 3] * 3, "n_blocks_per_stage": [1] * 3, "n_conv_per_stage_decoder": [1, 1],
        "conv_op": "torch.nn.modules.conv.Conv3d", "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {},
    }  # fmt: skip
    imported = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    return {"network_class_name": name, "arch_kwargs": kwargs, "_kw_requires_import": imported}


@pytest.mark.parametrize(
    ("encoder", "options"),
    [("hybrid", ()), ("resenc", ()), ("hybrid", ("--decoder", "unet", "--decoder_phase", "0.5"))],
    ids=["hybrid", "resenc", "unet"],
)
def test_an_interrupted_run_equals_an_uninterrupted_one(write_dataset, interrupted_run, small_runs, encoder, options):
    plans_file = write_dataset(n=4).with_name("tinyPlans.json")
    if encoder == "resenc":
        plans = json.loads(plans_file.read_text())
        plans["configurations"]["3d_fullres"]["architecture"] = residual_encoder()
        plans_file.write_text(json.dumps(plans))
    common = ("--encoder", encoder, *options, "--iterations", "6", "--save_every", "2", "--val_every", "3")
    common += ("--set", "val_crops=1")
    assert small_runs.here("-o", "whole", *common) == 0
    interrupted_run("-o", "broken", *common, after=5)
    assert (small_runs.folder("broken") / "checkpoint_latest.pth").is_file()
    assert small_runs.here("-o", "broken", "--c") == 0  # its own settings
    assert_same_end(small_runs, "whole", "broken")


def wait_for(process, happened, seconds=120.0):
    """Poll until something has happened or the process has ended; returns whether it has ended."""
    until = time.monotonic() + seconds
    while process.poll() is None and not happened():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.002)
    return process.poll() is not None


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_at_ten_moments_some_inside_checkpoint_writes(write_dataset, small_runs):
    """SIGKILL, with a process that reads crops; the last run is left alone."""
    write_dataset(n=4)
    runs = small_runs
    finish(runs.start("-o", "whole", *SETTINGS, workers="1"))

    moments = random.Random(0)
    folder = runs.folder("killed")
    latest, partial = folder / "checkpoint_latest.pth", folder / "checkpoint_latest.pth.tmp"
    inside = 0
    for number in range(10):
        more = ("--c",) if latest.is_file() else ()
        process = runs.start("-o", "killed", *SETTINGS, *more, workers="1")
        before = latest.stat().st_mtime_ns if more else 0
        if number % 2:  # as soon as a checkpoint is being written
            ended = wait_for(process, partial.is_file)
            inside += partial.is_file()
        else:  # some time after the next one has been written
            ended = wait_for(process, lambda old=before: latest.is_file() and latest.stat().st_mtime_ns != old)
            time.sleep(moments.uniform(0, 0.3))
        assert not ended or process.returncode == 0, process.communicate()[0][-3000:]
        process.kill()
        process.communicate()
        if (folder / "checkpoint_final.pth").is_file():
            break
    assert number >= 5
    assert inside >= 2  # killed with a half-written file beside the whole one
    if not (folder / "checkpoint_final.pth").is_file():
        finish(runs.start("-o", "killed", *SETTINGS, "--c", workers="1"))
    assert_same_end(runs, "whole", "killed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_exits_with_the_documented_code(write_dataset, small_runs, name):
    write_dataset(n=4)
    settings = ("--iterations", "100000", "--save_every", "100000", "--val_every", "100000", "--set", "val_crops=1")
    process = small_runs.start("-o", "run", *settings, workers="1")
    assert not wait_for(process, lambda: (small_runs.folder("run") / "train.csv").is_file() and small_runs.rows("run"))
    process.send_signal(getattr(signal, name))
    text, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, text[-3000:]
    assert "continue with --c" in text
    assert "Traceback" not in text
    stored = load_checkpoint(small_runs.folder("run") / "checkpoint_latest.pth")
    done = stored["provenance"]["iterations"]
    assert done == int(small_runs.rows("run")[-1]["iteration"]) > 0


@pytest.mark.slow
@pytest.mark.long
def test_a_full_disk_is_reported_and_the_run_goes_on_later(write_dataset, small_runs):
    """A limit on the size of files stands for the disk."""
    write_dataset(n=4)
    runs = small_runs
    settings = ("--iterations", "6", "--save_every", "2", "--val_every", "3", "--set", "val_crops=1")
    finish(runs.start("-o", "whole", *settings))
    process = runs.start("-o", "full", *settings)
    latest = runs.folder("full") / "checkpoint_latest.pth"
    assert not wait_for(process, latest.is_file)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2, text[-3000:]
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "disk space" in last
    assert not list(runs.folder("full").glob("*.tmp"))
    load_checkpoint(latest)
    finish(runs.start("-o", "full", "--c"))
    assert_same_end(runs, "whole", "full")


def test_a_damaged_byte_is_noticed(write_dataset, interrupted_run, small_runs, capsys):
    write_dataset(n=2)
    interrupted_run("-o", "run", "--iterations", "3", "--save_every", "1", "--set", "val_crops=1", after=2)
    latest = small_runs.folder("run") / "checkpoint_latest.pth"
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes(content)
    assert small_runs.here("-o", "run", "--c") == 2
    assert "checkpoint_latest.pth is damaged" in capsys.readouterr().err
    assert os.path.getsize(latest) == len(content)


def test_other_settings_are_refused_with_the_difference(write_dataset, interrupted_run, small_runs, capsys):
    write_dataset(n=2)
    interrupted_run("-o", "run", "--iterations", "3", "--save_every", "1", "--set", "val_crops=1", after=2)
    assert small_runs.here("-o", "run", "--c", "--set", "weight_decay=0.1") == 2
    assert "weight_decay 0.05 -> 0.1" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_refused(write_dataset, interrupted_run, small_runs, capsys):
    write_dataset(n=2)
    interrupted_run("--iterations", "3", "--save_every", "1", "-o", "cut", after=2)
    latest = small_runs.folder("cut") / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:5000])
    assert small_runs.here("--iterations", "3", "--save_every", "1", "-o", "cut", "--c") == 2
    assert "checkpoint_latest.pth is no readable checkpoint" in capsys.readouterr().err


def test_a_state_that_cannot_be_continued_is_named(write_dataset, interrupted_run, small_runs, capsys):
    """What others have changed is refused before anything is loaded from it."""
    write_dataset(n=2)
    interrupted_run("-o", "run", *SETTINGS, "--set", "probe_every=0", after=2)
    file = small_runs.folder("run") / "checkpoint_latest.pth"
    stored = torch.load(file, weights_only=True)
    optimizer = stored["resume_state"]["optimizer"]
    first, *others = optimizer
    kept = {name: optimizer[name] for name in others}
    states = {
        "none": {}, "list": [], "text": {"optimizer": "x"}, "another name": {"optimizer": {"x": optimizer[first]}},
        "no tensors": {"optimizer": {**kept, first: {**optimizer[first], "exp_avg": "x"}}},
        "another shape": {"optimizer": {**kept, first: {**optimizer[first], "exp_avg": torch.zeros(3, 1, 2)}}},
    }  # fmt: skip
    for kind, state in states.items():
        torch.save({**stored, "resume_state": state}, file)
        capsys.readouterr()
        assert small_runs.here("-o", "run", *SETTINGS, "--set", "probe_every=0", "--c") == 2, kind
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {file}"), kind
        assert "--init" in line
