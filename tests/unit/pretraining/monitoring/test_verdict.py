"""The verdict on hand-made histories, with and without noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nnunet_mim.pretraining.monitoring import verdict as v
from nnunet_mim.pretraining.monitoring.figures import measurements_of

ENDS = {"level1": 0.4, "level2": 0.6, "level3": 0.7}


def verdict(rows, **options):
    return v.verdict(measurements_of(rows), **options)


def history(curve, n=30, noise=0.0, seed=0, infill=0.9, **columns):
    """n measurements, 250 iterations apart; `curve(i)` goes from 1 (untrained) to 0 (as good as it gets)."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        row = {"iteration": 250.0 * i, **{name.replace("__", "/"): f(i) for name, f in columns.items()}}
        for level, end in ENDS.items():
            loss = end + (1.05 - end) * curve(i)
            row[f"val/{level}/reconstruction"] = loss * (1 + noise * random.normal())
            row[f"baseline/{level}/infill"] = infill
        row["val/loss"] = sum(row[f"val/{level}/reconstruction"] for level in ENDS)
        rows.append(row)
    return rows


def flat_after(n):
    return lambda i: max(0.0, 1 - i / n)


def test_learning_says_how_much():
    kind, sentence = verdict(history(lambda i: 1 - i / 60))
    assert kind == v.LEARNING
    first, last = (0.4 + 0.65 * (1 - i / 60) for i in (22, 29))
    assert sentence.startswith(
        f"learning: from iteration 5500 to 7250 the held-out loss fell by {1 - last / first:.1%}"
    )
    assert "at level 1, " in sentence
    assert sentence.endswith("every level is better than in-filling")


def test_learning_with_a_level_that_is_no_better_than_infilling():
    kind, sentence = verdict(history(lambda i: 1 - i / 60, infill=0.8))
    assert kind == v.LEARNING
    assert "level 2 and level 3 are still no better than in-filling (0.836 against 0.800 and 0.884 against" in sentence


def test_levels_that_are_not_trained_are_not_judged():
    rows = history(flat_after(16), infill=0.5)  # level 1 ends at 0.4, the others above in-filling
    assert verdict(rows).kind == v.WORSE
    kind, sentence = verdict(rows, level_weights=(1.0, 0.0, 0.0))
    assert kind == v.PLATEAUED
    assert "level 2" not in sentence
    assert "level 3" not in sentence
    falling = [{**row, "val/level3/reconstruction": 2.0 - i / 30} for i, row in enumerate(rows)]
    assert verdict(falling).kind == v.LEARNING
    assert verdict(falling, level_weights=(1.0, 1.0, 0.0)).kind == v.WORSE, "of level 2, though level 3 still falls"


def test_plateau_says_since_when():
    kind, sentence = verdict(history(flat_after(16)))
    assert kind == v.PLATEAUED
    assert "no level improved beyond its noise since iteration 4000" in sentence
    assert sentence.endswith("every level is better than in-filling")


@pytest.mark.parametrize(("n", "noise"), [(60, 0.005), (60, 0.03), (24, 0.003)])
def test_plateau_is_seen_through_noise(n, noise):
    verdicts = [verdict(history(flat_after(16), n=n, noise=noise, seed=seed)) for seed in range(40)]
    assert sum(kind == v.PLATEAUED for kind, _ in verdicts) >= 34
    since = [
        float(text.split("since iteration ")[1].split(";")[0].split(",")[0])
        for kind, text in verdicts
        if kind == v.PLATEAUED
    ]
    assert min(since) >= 3000
    assert np.median(since) <= 4500


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("seed", range(4))
def test_slow_learning_is_seen_through_noise(noise, seed):
    assert verdict(history(lambda i: math.exp(-i / 30), n=40, noise=noise, seed=seed)).kind == v.LEARNING


def test_one_bad_measurement_at_the_end_is_no_plateau():
    rows = history(lambda i: 1 - i / 60, n=12)
    for level in ENDS:
        rows[-1][f"val/{level}/reconstruction"] *= 1.06
    assert verdict(rows).kind == v.LEARNING


def test_a_slow_fall_in_much_noise_shows_in_the_best_measurements():
    losses = [1.0, 0.8, 0.68, 0.67, 0.67, 0.64, 0.59, 0.57, 0.548, 0.541, 0.497, 0.534, 0.497, 0.481]
    kind, sentence = verdict([{"iteration": 200.0 * i, "val/loss": loss} for i, loss in enumerate(losses)])
    assert kind == v.LEARNING
    assert sentence == "learning: since iteration 1800 the best held-out loss fell by 12.2% at all levels"


def test_a_jump_of_the_held_out_loss_hides_no_progress():
    """Measured every 200 iterations on 66 head-and-neck CT; iteration 2000 is out of line."""
    losses = {
        1: [
            1.087, 0.879, 0.779, 0.773, 0.666, 0.655, 0.602, 0.569,
            0.570, 0.529, 0.687, 0.512, 0.498, 0.512, 0.509, 0.503,
        ],
        2: [
            1.087, 0.953, 0.925, 0.931, 0.846, 0.795, 0.784, 0.764,
            0.745, 0.723, 0.864, 0.731, 0.704, 0.696, 0.700, 0.670,
        ],
        3: [
            1.088, 0.957, 0.945, 0.942, 0.869, 0.866, 0.827, 0.808,
            0.810, 0.796, 0.863, 0.771, 0.755, 0.741, 0.745, 0.724,
        ],
    }  # fmt: skip
    rows = [
        {"iteration": 200.0 * i, **{f"val/level{n}/reconstruction": column[i] for n, column in losses.items()}}
        for i in range(16)
    ]
    assert verdict(rows).kind == v.LEARNING
    for n in losses:  # and one that stays up is no jump
        for row in rows[10:]:
            row[f"val/level{n}/reconstruction"] = 0.7 + 0.1 * n
    assert verdict(rows).kind != v.LEARNING


def test_one_level_that_learns_is_enough():
    rows = history(flat_after(10))
    for i, row in enumerate(rows):
        row["val/level3/reconstruction"] = 1 - i / 100
    kind, sentence = verdict(rows)
    assert kind == v.LEARNING
    assert "at level 3, and did not change beyond its noise at level 1 and level 2" in sentence


def test_worse_than_infilling():
    kind, sentence = verdict(history(flat_after(10), infill=0.65))
    assert kind == v.WORSE
    assert sentence.startswith(
        "worse than in-filling: level 3 is still no better than in-filling (0.700 against 0.650); no level improved"
    )


def test_learning_by_heart_is_named():
    kind, sentence = verdict(history(lambda i: flat_after(10)(i) + 0.02 * max(0, i - 15)))
    assert kind == v.PLATEAUED
    assert "level 1, level 2 and level 3 got worse" in sentence


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"val__features__rank": lambda i: 60 * math.exp(-i / 4) + 1}, "effective rank of 1.0"),
        ({"val__features__std": lambda i: 0.6 * math.exp(-i / 4)}, "the same everywhere"),
    ],
)
def test_collapsed_features(columns, why):
    kind, sentence = verdict(history(lambda i: 1 - i / 60, **columns))
    assert kind == v.COLLAPSED
    assert why in sentence


def test_healthy_features_and_one_bad_measurement_are_no_collapse():
    healthy = {"val__features__rank": lambda i: 23.0, "val__features__std": lambda i: 0.7}
    assert verdict(history(lambda i: 1 - i / 60, **healthy)).kind == v.LEARNING
    rows = history(lambda i: 1 - i / 60, **healthy)
    rows[-1]["val/features/rank"] = 1.5
    assert verdict(rows).kind == v.LEARNING


def test_alignment_that_fell_back_to_chance_is_a_collapse():
    blind = math.log(8)

    def rows(late):
        return history(
            lambda i: 1 - i / 60,
            val__level2__alignment=lambda i: blind * (0.3 if 5 < i < 20 else late),
            val__level2__alignment_chance=lambda i: 1 / 8,
        )

    assert verdict(rows(1.001)).kind == v.COLLAPSED
    assert "alignment fell back to chance at level 2" in verdict(rows(1.001)).sentence
    assert verdict(rows(0.5)).kind == v.LEARNING
    never = history(
        lambda i: 1 - i / 60, val__level2__alignment=lambda i: blind, val__level2__alignment_chance=lambda i: 1 / 8
    )
    assert verdict(never).kind == v.LEARNING  # has not learnt to align yet


def test_a_loss_that_is_no_number_is_a_collapse():
    rows = history(lambda i: 1 - i / 60)
    rows[-1]["val/level1/reconstruction"] = math.nan
    kind, sentence = verdict(rows)
    assert kind == v.COLLAPSED
    assert "at iteration 7250" in sentence


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_measurements(n):
    kind, sentence = verdict(history(lambda i: 1 - i / 60, n=n))
    assert kind == v.TOO_EARLY
    assert f"{n} measurements" in sentence


def test_too_early_in_warmup_and_before_anything_happens():
    rows = history(lambda i: 1 - i / 60, n=8)
    assert verdict(rows, warmup_iterations=2000) == (
        v.TOO_EARLY, "too early to say: 1750 of 2000 warm-up iterations done",
    )  # fmt: skip
    assert verdict(rows, warmup_iterations=1000).kind == v.LEARNING
    assert verdict(history(lambda i: 1.0, n=3)).kind == v.TOO_EARLY
    assert verdict([{"iteration": 250.0 * i} for i in range(5)]).kind == v.TOO_EARLY


def test_what_is_no_better_than_the_mean_of_a_token():
    losses = [1.088, 1.0, 1.003, 1.012, 1.011]
    rows = [
        {"iteration": 250.0 * i, "val/level1/reconstruction": loss, "baseline/level1/token_mean": 0.9997}
        for i, loss in enumerate(losses + [1.01] * 7)
    ]
    for n in (4, 5, 9):
        kind, sentence = verdict(rows[:n])
        assert kind == v.TOO_EARLY
        assert sentence.endswith("no level is better than predicting each token's mean yet")
    kind, sentence = verdict(rows)
    assert kind == v.PLATEAUED
    assert "level 1 no better than predicting each token's mean" in sentence


def test_the_untrained_network_is_no_measure_of_progress():
    losses = [1.088, 0.9, 0.9, 0.9, 0.9, 0.9]
    kind, _ = verdict([{"iteration": 250.0 * i, "val/level1/reconstruction": loss} for i, loss in enumerate(losses)])
    assert kind == v.PLATEAUED


def test_missing_columns_and_levels():
    rows = [{"iteration": 10.0 * i, "val/loss": 3 - 0.05 * i} for i in range(8)]
    kind, sentence = verdict(rows)
    assert kind == v.LEARNING
    assert sentence == "learning: from iteration 30 to 70 the held-out loss fell by 7.0% at all levels"
    two = [{k: x for k, x in row.items() if "level1" not in k} for row in history(flat_after(10))]
    assert verdict(two).kind == v.PLATEAUED
    for row in rows[::2]:
        row["val/probe/dice"] = 0.5  # only some rows have it
    assert verdict(rows).kind == v.LEARNING
