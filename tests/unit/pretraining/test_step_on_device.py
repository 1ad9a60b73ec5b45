"""How a step is computed: what is recomputed or compiled changes nothing, and nothing waits for the device."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks import depthwise
from nnunet_mim.networks.build import build_network
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.pretraining.objective.levels import add_pass, level_losses, unet_losses
from nnunet_mim.pretraining.objective.views import nested_views
from nnunet_mim.pretraining.options import RunOptions

NETWORK = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), 2, decoder_embed_dim=12, decoder_depth=2, decoder_num_heads=2)
CONFIG = PretrainConfig(network=NETWORK, view_size=(32, 32, 32), n_children=(2, 2))
FLAT = 0.05


def make_model():
    torch.manual_seed(0)
    return MaskInMask(NETWORK)


def make_views(generator=None):
    levels = levels_of(CONFIG)
    torch.manual_seed(1)
    crops = torch.randn(2, 1, *levels[0].fov)
    valid = torch.tensor([[[0, n] for n in levels[0].fov]] * 2)
    generator = generator or torch.Generator().manual_seed(0)
    return nested_views(crops, valid, torch.zeros(1), levels, generator, torch.tensor([FLAT]))


def step(model, views, **how):
    """Losses, gradients by name, and bytes that the backward pass keeps."""
    bare = getattr(model, "_orig_mod", model)
    bare.zero_grad()
    kept, losses = 0, []

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for loss, _ in level_losses(model, views, torch.tensor([FLAT]), CONFIG, **how):
            losses.append(loss.detach())
            loss.backward()
    return torch.stack(losses), {name: p.grad.clone() for name, p in bare.named_parameters()}, kept


@pytest.mark.parametrize("levels", [(1,), (2, 3), (1, 2, 3)])
def test_recomputing_keeps_less_and_changes_nothing(levels):
    model, views = make_model(), make_views()
    losses, gradients, kept = step(model, views, views_per_pass=1000)
    found_losses, found_gradients, found_kept = step(model, views, recompute=levels)
    assert torch.equal(losses, found_losses)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-7)
    assert found_kept < kept * (0.95 if levels == (1,) else 0.7)


def kept_by_the_largest_pass(n_children, views_per_pass):
    """Bytes that the backward pass of one pass keeps."""
    config = replace(CONFIG, n_children=n_children)
    model, levels = make_model(), levels_of(config)
    crops = torch.randn(2, 1, *levels[0].fov)
    valid = torch.tensor([[[0, n] for n in levels[0].fov]] * 2)
    views = nested_views(crops, valid, torch.zeros(1), levels, torch.Generator().manual_seed(0))
    kept = [0]

    def pack(tensor):
        kept[-1] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for loss, _ in level_losses(model, views, torch.tensor([FLAT]), config, views_per_pass):
            loss.backward()
            kept.append(0)
    return max(kept)


def test_memory_does_not_grow_with_the_number_of_views():
    few, many = (kept_by_the_largest_pass(n_children, 2) for n_children in ((1, 1), (4, 4)))
    assert many < 1.05 * few  # 6 and 42 views
    assert kept_by_the_largest_pass((4, 4), None) > 8 * few  # the test itself: in one pass it would


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("triton", "recompute"), [(False, (1, 2, 3)), (True, ())])
def test_a_step_compiles_without_graph_breaks(triton, recompute, monkeypatch):
    """fullgraph=True raises at the first break; Triton's kernels are interpreted."""
    torch._dynamo.reset()
    model, views = make_model(), make_views()
    passes = 1000 if recompute else None
    losses, gradients, _ = step(model, views, views_per_pass=passes)
    if triton:
        kernels = pytest.importorskip("nnunet_mim.networks.depthwise_triton")
        monkeypatch.setattr(depthwise, "use_triton", lambda device: True)
        monkeypatch.setattr(kernels, "ROWS", 4096)  # the interpreter takes as long for a large block as for a small one
        monkeypatch.setattr(kernels, "LINES_PER_CHUNK", 512)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    found_losses, found_gradients, _ = step(compiled, views, recompute=recompute)
    torch.testing.assert_close(found_losses, losses, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("views_per_pass", [3, None])
def test_nothing_in_a_step_reads_a_value_from_the_device(views_per_pass):
    """Fake tensors have shapes but no values: .item(), a data-dependent shape or branch raises."""
    levels = levels_of(CONFIG)
    make_views()  # the geometry's tensors exist once, as in any iteration but the first
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_network(replace(CONFIG, decoder="unet"))
        crops = torch.randn(2, 1, *levels[0].fov)
        valid = torch.zeros(2, 3, 2, dtype=torch.int64)
        views = nested_views(
            crops, valid, torch.zeros(1), levels, torch.Generator().manual_seed(0), torch.full((1,), FLAT)
        )
        figures = []
        for loss, parts in level_losses(model, views, torch.full((1,), FLAT), CONFIG, views_per_pass):
            loss.backward()
            for part in parts:
                add_pass(figures, part.figures)
        for loss, _ in unet_losses(model, views, torch.full((1,), FLAT), CONFIG, views_per_pass):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=False)
        with pytest.raises(DataDependentOutputException):
            figures[0].loss.item()  # the test itself: this would be noticed


@pytest.mark.parametrize(
    ("options", "message"),
    [({"views_per_pass": 0}, "views_per_pass"), ({"recompute": (4,)}, "recompute"), ({"workers": -1}, "workers")],
)
def test_bad_options(options, message):
    with pytest.raises(MiMError, match=message):
        RunOptions(**options)
