import numpy as np
import pytest
import torch

from nnunet_mim.classification.labels import Target
from nnunet_mim.classification.results import (
    Predictions,
    joined,
    predictions_csv,
    read_predictions,
    read_weights,
    weights_sha256,
    write_weights,
)
from nnunet_mim.errors import MiMError


def predictions(cases, fold, name, classes, seed=0):
    rng = np.random.default_rng(seed)
    raw, calibrated = (rng.dirichlet(np.ones(len(classes)), len(cases)) for _ in range(2))
    labels = rng.integers(-1, len(classes), len(cases))
    patients = tuple(f"p_{case}" for case in cases)
    return Predictions(
        tuple(cases), patients, np.full(len(cases), fold), Target(name, classes, labels), raw, calibrated
    )


def test_a_table_comes_back(tmp_path):
    cases = ["b", "a", "c, with comma"]
    written = [predictions(cases, 2, "sick", ("0", "1")), predictions(cases, 2, "a=b", ("x=y", "z", "u:raw"), seed=1)]
    (tmp_path / "predictions.csv").write_bytes(predictions_csv(written))
    heading = (tmp_path / "predictions.csv").read_text().splitlines()[0]
    assert heading.startswith("case,patient,fold,sick,sick=0,sick=1,sick=0:raw,sick=1:raw,a=b")
    read = read_predictions(tmp_path / "predictions.csv")
    for one, other in zip(written, read, strict=True):
        assert (one.cases, one.patients) == (other.cases, other.patients)
        assert one.target.classes == other.target.classes
        np.testing.assert_array_equal(one.target.labels, other.target.labels)
        np.testing.assert_allclose(one.raw, other.raw, rtol=1e-8)
        np.testing.assert_allclose(one.calibrated, other.calibrated, rtol=1e-8)


def test_folds_are_joined_in_the_order_of_cases():
    first, second = predictions("db", 0, "sick", ("0", "1")), predictions("ca", 1, "sick", ("0", "1"), seed=1)
    found = joined([first, second])
    assert found.cases == ("a", "b", "c", "d")
    assert found.patients == ("p_a", "p_b", "p_c", "p_d")
    assert found.folds.tolist() == [1, 0, 1, 0]
    np.testing.assert_array_equal(found.raw, [second.raw[1], first.raw[1], second.raw[0], first.raw[0]])
    np.testing.assert_array_equal(found.positive, found.calibrated[:, 1])


def test_a_damaged_table_is_named(tmp_path):
    path = tmp_path / "predictions.csv"
    with pytest.raises(MiMError, match=r"predictions.csv .*: train this fold again"):
        read_predictions(path)
    path.write_text("case,patient,fold,sick,sick=0,sick=1,sick=0:raw,sick=1:raw\n")
    with pytest.raises(MiMError, match="no rows"):
        read_predictions(path)
    path.write_text("case,patient,fold,sick,sick=0,sick=1\na,a,0,1,0.5,0.5\n")
    with pytest.raises(MiMError, match="train this fold again"):
        read_predictions(path)


def test_weights_are_written_once_and_checked(tmp_path):
    shared = torch.arange(6.0)
    weights = {"a": shared, "b": shared.view(2, 3)}
    digest = weights_sha256(weights)
    write_weights(tmp_path, weights, digest)
    (path,) = tmp_path.iterdir()
    read = read_weights(tmp_path, digest)
    assert all(torch.equal(read[name], value) for name, value in weights.items())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="other weights than settings"):
        read_weights(tmp_path, digest)
    path.write_bytes(content[:20])
    with pytest.raises(ValueError, match=r"."):
        read_weights(tmp_path, digest)
