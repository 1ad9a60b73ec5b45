"""A recorded step: what is recorded, copied and put back. That it computes the same is shown on a GPU (test_cli.py)."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import levels_of
from nnunet_mim.pretraining.cli import _build_parser
from nnunet_mim.pretraining.monitoring.figures import TrainingFigures
from nnunet_mim.pretraining.objective.views import nested_views
from nnunet_mim.pretraining.options import RunOptions
from nnunet_mim.pretraining.step import (
    PROBE_STEPS,
    PROBE_VIEWS,
    WARM_UP,
    DeviceMemoryError,
    RecordedStep,
    SizedStep,
    build_step,
    full_memory_named,
)


class Stream:
    """Of no device."""

    def wait_stream(self, other):
        """All of one stream here."""


@pytest.fixture
def no_gpu(monkeypatch):
    """Where there is no GPU: what is recorded is also run, and a replay runs the recorded function again."""
    recorded = []

    class Graph:
        def replay(self):
            recorded[0]()

    @contextmanager
    def graph(_, stream, capture_error_mode):
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    return recorded


def views_of(seed):
    config = replace(PretrainConfig(), view_size=(32, 32, 32), n_children=(2, 1), scale=(2, 2, 2))
    levels = levels_of(config)
    generator = torch.Generator().manual_seed(seed)
    crops = torch.randn(1, 1, *levels[0].fov, generator=generator)
    valid = torch.tensor([[[0, n] for n in levels[0].fov]])
    return nested_views(crops, valid, torch.zeros(1), levels, generator)


def test_views_and_rate_of_every_replay_are_those_of_its_call(no_gpu):
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.AdamW([{"params": [parameter]}], lr=0.5)
    calls, out = [], torch.zeros(())

    def step(views):
        def compute():
            calls.append(float(optimizer.param_groups[0]["lr"] if not no_gpu else recorded.rates[0]))
            out.copy_(sum(view.images.sum() + view.ids_keep.sum() + view.places.sum() for view in views))

        if optimizer.param_groups[0].get("capturable"):
            no_gpu.append(compute)
        else:
            compute()
        return TrainingFigures(grad_norm=out)

    recorded = RecordedStep(step, optimizer)
    figures = []
    for seed in range(WARM_UP + 3):
        optimizer.param_groups[0]["lr"] = float(seed)
        figures.append(recorded(views_of(seed)))
        if seed < WARM_UP:
            figures[-1] = TrainingFigures(grad_norm=out.clone())
        assert optimizer.param_groups[0]["lr"] == float(seed), "checkpoints keep a plain number"
        assert not optimizer.param_groups[0]["capturable"]
    assert len(no_gpu) == 1, "recorded once"
    assert calls == [float(seed) for seed in range(WARM_UP + 3)]
    for seed, found in enumerate(figures):
        wanted = sum(view.images.sum() + view.ids_keep.sum() + view.places.sum() for view in views_of(seed))
        torch.testing.assert_close(found.grad_norm, wanted)
    with pytest.raises(ValueError, match="other shapes"):
        recorded([replace(view, images=view.images[:, :, :16]) for view in views_of(0)])


def recorded_step(fail):
    """A step whose recording calls `fail`, at its third call, and its optimiser."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(()))], lr=0.5)

    def step(_):
        if optimizer.param_groups[0].get("capturable"):
            fail()
        return TrainingFigures()

    recorded = RecordedStep(step, optimizer)
    for _ in range(WARM_UP):
        recorded(views_of(0))
    return recorded, optimizer


def fail_as_a_capture_does(error):
    """PyTorch ends a recording that has failed with an error of its own."""
    try:
        raise error
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore lines")


def test_a_step_that_cannot_be_recorded_names_the_cause(no_gpu):
    recorded, optimizer = recorded_step(lambda: fail_as_a_capture_does(ValueError("a loss was read\nmore lines")))
    message = r"^a step could not be recorded as a CUDA graph \(ValueError: a loss was read\): add --no-record$"
    with pytest.raises(MiMError, match=message):
        recorded(views_of(0))
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("memory", "other", "passes"),
    [
        (1000, None, None),  # 80 of 5 views would fit
        (63, None, None),  # just 5
        (61, None, 4),
        (40, None, 3),
        (5, None, 1),
        (1000, 3, 3),  # no more fit on another rank
        (40, 100, 3),
    ],
)
def test_passes_are_as_large_as_the_memory_allows(monkeypatch, memory, other, passes):
    """A view takes 10 bytes; 8 of them at most are computed at once while that is measured."""
    views = views_of(0)
    n_views = [len(level.images) for level in views]
    assert n_views == [1, 2, 2]
    largest, made = max(n_views), []

    def in_passes_of(n):
        made.append(n)
        return lambda views: TrainingFigures(grad_norm=torch.tensor(float(n or 0)))

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 50 + 10 * min(largest, PROBE_VIEWS))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50 + memory // 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory - memory // 2, 10**6))
    ranks = SimpleNamespace(least=lambda number, device: min(number, other or number))
    step = SizedStep(in_passes_of, torch.device("cpu"), ranks)
    for _ in range(PROBE_STEPS):
        assert step(views).grad_norm == PROBE_VIEWS  # nothing has changed yet
    assert step(views).grad_norm == (passes or 0)
    step(views)
    assert made == [PROBE_VIEWS, passes]


def test_full_memory_while_recording_is_not_answered_with_no_record(no_gpu):
    recorded, _ = recorded_step(lambda: fail_as_a_capture_does(torch.OutOfMemoryError("CUDA out of memory")))
    run = SimpleNamespace(options=RunOptions(views_per_pass=32), config=PretrainConfig(batch_size=8))
    remedy = r"of 8 crops: add --recompute 1 2 3 or --views_per_pass 16 or --batch 4$"
    with pytest.raises(DeviceMemoryError, match=remedy), full_memory_named(run):
        recorded(views_of(0))


@pytest.mark.parametrize(("full_at", "in_use"), [(1, PROBE_VIEWS), (PROBE_STEPS, PROBE_VIEWS), (PROBE_STEPS + 1, 3)])
def test_what_is_named_needs_less_than_the_passes_in_use(monkeypatch, full_at, in_use):
    """Passes of 3 views fit, by what the second step took; fewer are named where those do not."""
    calls = []

    def in_passes_of(n):
        def step(views):
            calls.append(n)
            if len(calls) == full_at:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return TrainingFigures()

        return step

    sizes = {"memory_allocated": 0, "max_memory_allocated": 20, "memory_reserved": 0, "mem_get_info": (40, 99)}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    step, views = SizedStep(in_passes_of, torch.device("cpu")), views_of(0) * 2  # ten views, two at most of a level
    run = SimpleNamespace(options=RunOptions(), config=PretrainConfig(batch_size=1))
    for _ in range(full_at - 1):
        step(views)
    with pytest.raises(DeviceMemoryError) as error, full_memory_named(run):
        step(views)
    assert calls[-1] == in_use
    assert str(error.value).endswith(f"--views_per_pass {in_use // 2}")


@pytest.mark.parametrize(
    ("options", "batch", "remedy"),
    [
        (RunOptions(views_per_pass=1), 1, "add --recompute 1 2 3"),
        (RunOptions(views_per_pass=4, recompute=(1, 2, 3)), 1, "add --views_per_pass 2"),
        (RunOptions(views_per_pass=1, recompute=(3, 2, 1)), 1, "choose a smaller --view or --preset"),
    ],
)
def test_only_what_can_still_be_turned_is_named(options, batch, remedy):
    run = SimpleNamespace(options=options, config=PretrainConfig(batch_size=batch))
    with pytest.raises(DeviceMemoryError) as error, full_memory_named(run):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert str(error.value).endswith(f"a step of {batch} crops: {remedy}")
    flags = remedy.removeprefix("add ").split() if remedy.startswith("add") else []
    assert _build_parser().parse_args(["-d", "1", *flags])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("options", "recorded", "sized"),
    [
        (RunOptions(), True, True),
        (RunOptions(views_per_pass=3), True, False),
        (RunOptions(record=False), False, True),
        (RunOptions(compile=True), False, True),
        (RunOptions(recompute=(3,)), False, True),
    ],
)
def test_which_step_a_gpu_takes(monkeypatch, world, options, recorded, sized):
    """Several ranks record too, and measure how many views fit."""
    on_cpu = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda value, device=None: on_cpu(value))
    fabric = SimpleNamespace(device=torch.device("cuda"), global_rank=world - 1, world_size=world)
    run = SimpleNamespace(options=options, config=PretrainConfig(), data=SimpleNamespace(flat_threshold=[0.1]))
    step = build_step(SimpleNamespace(model=torch.nn.Linear(1, 1), optimizer=None), run, fabric, unet_learns=False)
    assert isinstance(step, RecordedStep) == recorded
    step = step.step if recorded else step
    assert isinstance(step, SizedStep) == sized
    assert not sized or step.ranks.world == world
