"""Several processes, one batch: what they compute together equals what one process computes alone."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.config import NetworkConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.pretraining.distributed.launch import device_count
from nnunet_mim.pretraining.state import _load_optimizer_state, _optimizer_state

NETWORK = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), 2, decoder_embed_dim=12, decoder_depth=2, decoder_num_heads=2)
SETTINGS = ("--iterations", "4", "--val_every", "2", "--save_every", "1", "--set", "val_crops=2")
STEP = Path(__file__).with_name("step_of_rank.py")


@pytest.fixture
def step_of(tmp_path, free_port):
    """step_of(world, alignment, views_per_pass) → figures and gradients of one step, computed by `world` processes."""

    def run(world, alignment, views_per_pass):
        out = tmp_path / f"{world}.pth"
        commands = [
            [sys.executable, str(STEP), str(out), str(rank), str(world), str(free_port), alignment, views_per_pass]
            for rank in range(world)
        ]
        processes = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
        for process in processes:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said[-3000:]
        return torch.load(out)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("alignment", "views_per_pass"), [("infonce", "3"), ("infonce", "0"), ("cosine", "0")])
def test_two_processes_have_the_gradients_of_one(step_of, alignment, views_per_pass):
    """Contrastive negatives of the other rank included: float64, 1e-9."""
    figures, gradients = step_of(1, alignment, "3")
    their_figures, theirs = step_of(2, alignment, views_per_pass)
    assert set(theirs) == set(gradients)
    assert float(figures["train/level2/targets"]) > 0
    for name, value in figures.items():
        torch.testing.assert_close(their_figures[name], value, rtol=1e-9, atol=1e-12, msg=name)
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        assert float((theirs[name] - gradient).abs().max()) <= 1e-9 * largest, name
    assert largest > 0


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(runs, tag):
    return [{k: float(v) for k, v in row.items() if v} for row in runs.rows(tag) + runs.rows(tag, "val")]


def finish(process):
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text[-9000:]
    return text


@pytest.mark.slow
@pytest.mark.long
def test_the_command_on_two_processes_equals_one_and_any_number_continues(write_dataset, small_runs):
    """Started by Fabric and by torchrun; continued on another number of processes than it began with."""
    write_dataset(n=4)
    runs = small_runs
    finish(runs.start("-o", "one", *SETTINGS, batch="4"))
    text = finish(runs.start("-o", "two", *SETTINGS, "-num_gpus", "2", batch="4", workers="1"))
    assert text.count("wrote ") == 1  # only the first rank speaks
    assert text.count("iteration 4: ") == 1
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    finish(runs.start("-o", "torchrun", *SETTINGS, batch="4", launcher=torchrun))
    process = runs.start("-o", "changed", *SETTINGS, batch="4", workers="1")
    while not (runs.folder("changed") / "checkpoint_latest.pth").is_file():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    finish(runs.start("-o", "changed", "--c", "-num_gpus", "2", batch="4"))
    for tag in ("two", "torchrun", "changed"):
        for one, two in zip(losses(runs, "one"), losses(runs, tag), strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-5), tag
    weights = [
        load_checkpoint(runs.folder(tag) / "checkpoint_final.pth")["network_weights"] for tag in ("one", "torchrun")
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("more", [(), ("--compile",)])
def test_two_gpus_equal_one(write_dataset, small_runs, more):
    """NCCL, in float32; sums on a GPU depend on the order of threads."""
    write_dataset(n=4)
    settings = (*SETTINGS, "-device", "cuda", "--precision", "32-true")
    finish(small_runs.start("-o", "one", *settings, batch="4"))
    finish(small_runs.start("-o", "two", *settings, "-num_gpus", "2", *more, batch="4", workers="1"))
    for one, two in zip(losses(small_runs, "one"), losses(small_runs, "two"), strict=True):
        assert two == pytest.approx(one, rel=5e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_process_ends_the_run(write_dataset, small_runs, victim):
    write_dataset(n=4)
    settings = ("--iterations", "100000", "--val_every", "100000", "--save_every", "100000", "--set", "val_crops=1")
    process = small_runs.start("-o", "run", *settings, "-num_gpus", "2", batch="2")
    until = time.monotonic() + 120
    while not (small_runs.folder("run") / "train.csv").is_file() or not small_runs.rows("run"):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    ranks = [pid for pid in children if "mim_pretrain" in command(pid) or "pretraining.cli" in command(pid)]
    os.kill(process.pid if victim == 0 else ranks[0], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    until = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") and command(pid) for pid in ranks):
        assert time.monotonic() < until, "a process was left behind"
        time.sleep(0.1)


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_the_state_of_the_optimiser_goes_by_name():
    torch.manual_seed(0)
    first, second = (MaskInMask(NETWORK) for _ in range(2))
    second.load_state_dict(first.state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, fused=True) for model in (first, second)]
    used = [p for name, p in first.named_parameters() if not name.startswith("projectors")]

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = None if name.startswith("projectors") else gradient
        optimizer.step()

    step(first, optimizers[0], 0)
    state = _optimizer_state(first, optimizers[0])
    assert len(state) == len(used)
    second.load_state_dict(first.state_dict())
    _load_optimizer_state(second, optimizers[1], state)
    for model, optimizer in zip((first, second), optimizers, strict=True):
        step(model, optimizer, 1)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("environment", "wanted", "found"),
    [
        ({}, None, (1, 1)),
        ({}, 4, (4, 1)),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, None, (4, 2)),
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "mim"}, None, (4, 2)),
        ({"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "mim"}, 2, (2, 1)),
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "interactive"}, None, (1, 1)),
    ],
)
def test_devices_and_machines(monkeypatch, environment, wanted, found):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert device_count(wanted) == found


def test_another_number_than_torchrun_started(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MiMError, match="torchrun has started 4"):
        device_count(2)


def test_a_batch_that_cannot_be_shared(write_dataset, small_runs, capsys):
    write_dataset(n=2)
    assert small_runs.here("-num_gpus", "2", batch="3") == 2
    assert "multiple" in capsys.readouterr().err
