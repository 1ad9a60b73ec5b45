"""A step on fake CUDA tensors: nothing waits for the device or is copied, in any variant; what does is found.

test_kernel_count.py runs these tests in a process of their own.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from nnunet_mim.config import NetworkConfig
from nnunet_mim.pretraining.distributed.ranks import ALONE, Ranks

NETWORK = NetworkConfig((8, 8, 16, 24), (1, 1, 1, 2), 2, decoder_embed_dim=48, decoder_depth=2, decoder_num_heads=2)
VARIANTS = {
    "infonce": {},
    "cosine": {"alignment": "cosine"},
    "recompute": {"recompute": (1, 2, 3)},
}


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[3] / "benchmarks" / "gpu" / "kernel_count.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        with module.pretended_cuda():
            return module
    except module.NotPretendedError as error:
        pytest.skip(str(error))


def count(benchmark, alter=lambda views: views, recompute=(), ranks=ALONE, **changes):
    config = benchmark.config_of("tiny", 32, 2, (1, 1), **changes)
    return benchmark.count(replace(config, network=NETWORK), alter, recompute, ranks)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_step_neither_waits_nor_copies(benchmark, variant):
    found = count(benchmark, **VARIANTS[variant])
    assert (found.syncs, found.copies) == (0, 0)
    n_layers = 3 + 2 + 2  # blocks with an MLP: stages, transformer, decoder
    one_pass = variant != "recompute"  # else each of three levels has its own, computed twice
    n_passes, n_attentions = (1, 2) if one_pass else (6, 6)  # level 2 has another number of tokens than 1 and 3
    assert found.kernels["bias_gelu"] == n_layers * n_passes
    assert found.kernels["masked_depthwise"] == 2 * 3 * n_passes  # two kernels in each of three stages
    assert found.kernels["_scaled_dot_product_flash_attention"] == 4 * n_attentions  # transformer and decoder
    assert found.kernels["_fused_adamw_"] == 2  # with and without weight decay


OTHERS = {  # changes of the config, options of the step
    "no alignment": ({"alignment": "none"}, {}),
    "passes": ({}, {"views_per_pass": 1}),
    "float32": ({}, {"half": False}),
    "the U-Net too": ({"decoder": "unet"}, {}),
    "native ladder": ({"ladder": "native"}, {}),
    "two channels": ({"in_channels": 2}, {}),
    "anisotropic": ({"network": replace(NETWORK, strides=((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)))}, {}),
}


@pytest.mark.long
@pytest.mark.parametrize("variant", list(OTHERS))
def test_other_steps_neither_wait_nor_copy(benchmark, variant):
    changes, options = OTHERS[variant]
    config = replace(benchmark.config_of("tiny", 32, 2, (1, 1)), **{"network": NETWORK, **changes})
    found = benchmark.count(config, **options)
    assert (found.syncs, found.copies) == (0, 0)
    assert found.figures()["kernels"] > 300


def test_what_two_ranks_tell_each_other_waits_for_nothing(benchmark):
    """So it can be recorded with the step."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        alone, both = count(benchmark), count(benchmark, ranks=Ranks(0, 2))
    finally:
        dist.destroy_process_group()
    assert (both.syncs, both.copies) == (0, 0)
    messages = {name: n for name, n in both.kernels.items() if name not in alone.kernels}
    # numbers of targets and of views inside, for each of three levels, and the gradients; features of two parents
    assert messages == {"allreduce_": 3 * 2 + 1, "allgather_": 2}


PLANTED = {  # what it does to images → syncs, copies
    "item": (lambda images: images * images.sum().item(), (1, 0)),
    "branch on a value": (lambda images: images if images.sum() > 0 else -images, (1, 0)),
    "copy to the host": (lambda images: images.mean().cpu(), (0, 1)),
    "copy to the device": (lambda images: images + torch.ones(32).to(images.device), (0, 1)),
    "index on the host": (lambda images: images[torch.arange(2)], (0, 1)),
    "number on the host": (lambda images: images * torch.tensor(2.0), (0, 0)),
}


@pytest.mark.parametrize("fault", list(PLANTED))
def test_a_fault_is_found(benchmark, fault):
    change, wanted = PLANTED[fault]
    with benchmark.pretended_cuda(), FakeTensorMode(), benchmark.KernelCount() as found:
        change(torch.empty(2, 1, 32, 32, 32, device="cuda"))
    assert (found.syncs, found.copies) == wanted


def test_faults_in_a_step_are_found(benchmark):
    def alter(views):
        views[0].images.mean().cpu()
        return [replace(views[0], images=views[0].images * views[0].images.sum().item()), *views[1:]]

    found = count(benchmark, alter)
    assert (found.syncs, found.copies) == (1, 1)


def test_an_array_on_the_host_raises(benchmark):
    with (
        benchmark.pretended_cuda(), FakeTensorMode(), benchmark.KernelCount(),
        pytest.raises(RuntimeError, match="cpu"),
    ):  # fmt: skip
        torch.empty(2, 32, device="cuda") + torch.ones(32)


def test_kernels_and_bytes_by_hand(benchmark):
    """A product, a sum along rows of a view of it, in bf16: 4x8 by 8x2, and 2x4 to 2."""
    with benchmark.pretended_cuda(), FakeTensorMode(), benchmark.KernelCount() as found:
        a, b = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in ((4, 8), (8, 2)))
        (a @ b).t().sum(dim=1)
    assert found.kernels == {"mm": 1, "sum": 1}
    assert found.bytes == {"mm": 2 * (32 + 16 + 8), "sum": 2 * (8 + 2)}
