"""Losses against loop-written twins, and the properties one relies on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.pretraining.objective.losses import (
    cosine_loss,
    flat_tokens,
    infonce_loss,
    normalize_tokens,
    reconstruction_loss,
)

seeds = st.integers(0, 2**31 - 1)


def close(found, wanted, relative=1e-5):
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(wanted).double(), rtol=relative, atol=relative
    )


@given(n=st.integers(1, 3), m=st.integers(1, 4), p=st.integers(2, 9), data=st.data(), seed=seeds)
def test_reconstruction_matches_the_twin(reference, n, m, p, data, seed):
    torch.manual_seed(seed)
    prediction = torch.randn(n, m, p, requires_grad=True)
    values = torch.linspace(-1, 1, p) + 0.2 * torch.rand(n, m, p)  # spread out: float32 holds their variance well
    tokens = values * (0.5 + 3 * torch.rand(n, m, 1)) + torch.randn(n, m, 1)
    is_target = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=n, max_size=n))
    )
    found = reconstruction_loss(prediction, tokens, is_target)
    wanted = reference.losses.reconstruction(prediction, tokens, is_target)
    close(found, wanted)
    if is_target.any():
        (a,), (b,) = torch.autograd.grad(found, prediction), torch.autograd.grad(wanted, prediction)
        close(a, b)
        assert (a[~is_target] == 0).all()


def test_normalized_tokens_by_hand():
    tokens = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    variance = (4 + 1 + 0 + 9) / 3  # unbiased
    wanted = torch.tensor([[-2.0, -1.0, 0.0, 3.0], [0.0] * 4], dtype=torch.float64) / (variance + 1e-6) ** 0.5
    torch.testing.assert_close(normalize_tokens(tokens), wanted)
    torch.testing.assert_close(
        normalize_tokens(torch.tensor([0.0, 2e-3])), torch.tensor([-1e-3, 1e-3]) / (2e-6 + 1e-6) ** 0.5
    )


def test_the_target_does_not_depend_on_brightness_or_contrast():
    torch.manual_seed(0)
    tokens = torch.randn(2, 3, 64, dtype=torch.float64)
    torch.testing.assert_close(normalize_tokens(7 * tokens - 3), normalize_tokens(tokens), rtol=1e-5, atol=1e-6)


def test_a_perfect_prediction_has_no_loss(reference):
    torch.manual_seed(0)
    tokens = torch.randn(2, 3, 24)
    perfect = torch.tensor([[reference.losses.normalized(token.tolist()) for token in view] for view in tokens])
    every = torch.ones(2, 3, dtype=torch.bool)
    assert reconstruction_loss(perfect, tokens, every) < 1e-12
    assert reconstruction_loss(perfect + 0.1, tokens, every).item() == pytest.approx(0.01, rel=1e-4)


def test_predicting_the_mean_costs_about_one():
    tokens = torch.randn(1, 1, 1000, generator=torch.Generator().manual_seed(0))
    loss = reconstruction_loss(torch.zeros_like(tokens), tokens, torch.ones(1, 1, dtype=torch.bool))
    assert loss.item() == pytest.approx(999 / 1000, rel=1e-4)


def test_tokens_that_are_no_target_do_not_count():
    torch.manual_seed(0)
    prediction, tokens = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    is_target = torch.tensor([[True, False, True, False], [False, False, False, True]])
    loss = reconstruction_loss(prediction, tokens, is_target)
    prediction[~is_target], tokens[~is_target] = 1e6, -3.0
    assert torch.equal(reconstruction_loss(prediction, tokens, is_target), loss)


def test_no_target_at_all_is_zero_with_zero_gradient():
    prediction = torch.randn(2, 3, 8, requires_grad=True)
    loss = reconstruction_loss(prediction, torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert (prediction.grad == 0).all()


def test_half_precision_predictions_are_compared_in_float32():
    prediction = torch.randn(1, 2, 64).bfloat16()
    tokens, every = torch.randn(1, 2, 64), torch.ones(1, 2, dtype=torch.bool)
    loss = reconstruction_loss(prediction, tokens, every)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, reconstruction_loss(prediction.float(), tokens, every))


@given(n=st.integers(1, 5), channels=st.integers(1, 3), voxels=st.integers(2, 8), seed=seeds)
def test_flat_tokens_match_the_twin(reference, n, channels, voxels, seed):
    torch.manual_seed(seed)
    tokens = torch.randn(n, 2, voxels * channels, dtype=torch.float64) * torch.rand(n, 2, 1) * 0.2
    thresholds = torch.rand(channels, dtype=torch.float64) * 0.2
    wanted = [[reference.losses.is_flat(token.tolist(), thresholds.tolist()) for token in view] for view in tokens]
    assert flat_tokens(tokens, thresholds).tolist() == wanted


@pytest.mark.parametrize(
    ("deviation_hu", "flat"), [(0.0, True), (9.0, True), (9.9, True), (10.1, False), (50.0, False)]
)
def test_below_10_hu_of_a_2000_hu_window_is_air(deviation_hu, flat):
    """Units as nnU-Net's CTNormalization makes them from the wide window: -1000…1000 HU, mean 0, std 250."""
    voxels = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    voxels = (voxels - voxels.mean()) / voxels.std() * deviation_hu - 900
    window = 2000 / 250
    assert flat_tokens((voxels / 250)[None], torch.tensor([0.005 * window], dtype=torch.float64)).tolist() == [flat]


def test_a_token_counts_where_any_channel_has_structure():
    quiet, loud = torch.zeros(8), torch.arange(8.0)
    assert flat_tokens(torch.stack([quiet, loud], dim=1).reshape(1, -1), torch.tensor([0.1, 0.1])).tolist() == [False]
    assert flat_tokens(torch.stack([quiet, quiet + 50], dim=1).reshape(1, -1), torch.tensor([0.1, 0.1])).tolist() == [
        True
    ]


@st.composite
def alignment_inputs(draw):
    torch.manual_seed(draw(seeds))
    n, q, d = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(2, 6))
    child, parent = torch.randn(n, d, requires_grad=True), torch.randn(q, d, requires_grad=True)
    target = torch.tensor(draw(st.lists(st.integers(0, q - 1), min_size=n, max_size=n)))
    weight = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0, 1.0]), min_size=n, max_size=n)))
    return child, parent, target, weight


@given(inputs=alignment_inputs(), temperature=st.sampled_from([0.05, 0.2, 1.0]))
def test_infonce_matches_the_twin(reference, inputs, temperature):
    child, parent, target, weight = inputs
    loss, accuracy = infonce_loss(*inputs, temperature)
    wanted, hits = reference.losses.infonce(child, parent, target.tolist(), weight.tolist(), temperature)
    close(loss, wanted)
    close(accuracy, hits)
    if weight.any():
        for a, b in zip(
            torch.autograd.grad(loss, (child, parent)), torch.autograd.grad(wanted, (child, parent)), strict=True
        ):
            close(a, b, 1e-4)


@given(inputs=alignment_inputs())
def test_cosine_matches_the_twin(reference, inputs):
    child, parent, target, weight = inputs
    loss = cosine_loss(*inputs)
    wanted = reference.losses.cosine_alignment(child, parent, target.tolist(), weight.tolist())
    close(loss, wanted)
    if weight.any():
        (a,), (b,) = torch.autograd.grad(loss, child), torch.autograd.grad(wanted, child)
        close(a, b, 1e-4)


def test_children_that_are_all_padding_change_neither_loss():
    torch.manual_seed(0)
    child, parent, target = torch.randn(4, 6), torch.randn(5, 6), torch.tensor([0, 3, 1, 4])
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
    losses = [*infonce_loss(child, parent, target, weight, 0.2), cosine_loss(child, parent, target, weight)]
    child[weight == 0] = 100 * torch.randn(2, 6)
    changed = [*infonce_loss(child, parent, target, weight, 0.2), cosine_loss(child, parent, target, weight)]
    alone = [
        *infonce_loss(child[::2], parent, target[::2], weight[::2], 0.2),
        cosine_loss(child[::2], parent, target[::2], weight[::2]),
    ]
    for a, b, c in zip(losses, changed, alone, strict=True):
        assert torch.equal(a, b)
        close(a, c)


def test_all_children_padding_is_zero_with_zero_gradient():
    child, parent = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4)
    target, weight = torch.tensor([0, 1]), torch.zeros(2)
    loss = infonce_loss(child, parent, target, weight, 0.2)[0] + cosine_loss(child, parent, target, weight)
    loss.backward()
    assert loss == 0
    assert (child.grad == 0).all()


def test_lengths_do_not_matter_to_alignment():
    torch.manual_seed(0)
    child, parent, target, weight = torch.randn(3, 5), torch.randn(4, 5), torch.tensor([0, 1, 2]), torch.ones(3)
    close(
        infonce_loss(3 * child, 0.2 * parent, target, weight, 0.2)[0],
        infonce_loss(child, parent, target, weight, 0.2)[0],
    )
    close(cosine_loss(3 * child, 0.2 * parent, target, weight), cosine_loss(child, parent, target, weight))


def test_alignment_by_hand():
    child, parent = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    weight = torch.ones(2)
    loss, top1 = infonce_loss(child, parent, torch.tensor([0, 1]), weight, 0.2)
    close(loss, torch.log1p(torch.exp(torch.tensor(-5.0))))
    assert top1 == 1
    loss, top1 = infonce_loss(child, parent, torch.tensor([1, 1]), weight, 0.2)
    close(loss, torch.log1p(torch.exp(torch.tensor(-5.0))) + 2.5)
    assert top1 == 0.5
    assert cosine_loss(child, parent, torch.tensor([0, 1]), weight) == 0
    assert cosine_loss(child, -parent, torch.tensor([0, 1]), weight) == 4
    assert cosine_loss(child, parent, torch.tensor([1, 0]), weight) == 2
