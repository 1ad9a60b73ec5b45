"""Settings from a file, flags and --set; what a run leaves can be used again."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from nnunet_mim.config import PRESETS, NetworkConfig, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining.configure import _build_config, all_settings_table, merge_settings, write_config
from nnunet_mim.system.untrusted import read_yaml

VIEW, SCALE = (96, 96, 96), (2, 2, 2)
DOCS = Path(__file__).parents[3] / "docs" / "config.md"


def build(*parts):
    return _build_config(merge_settings(*parts), 1, VIEW, SCALE)


def test_nothing_set_gives_the_defaults():
    assert build({}) == PretrainConfig()


def test_later_parts_win_and_nested_names_mean_the_same():
    config = build({"iterations": 5, "network": {"depths": [1, 1, 1, 1]}}, {"iterations": 7, "network.mlp_ratio": 2.0})
    assert config.iterations == 7
    assert config.network == dataclasses.replace(PRESETS["base"], depths=(1, 1, 1, 1), mlp_ratio=2.0)


def test_learning_rate_follows_the_preset_unless_set():
    assert build({"preset": "tiny"}).learning_rate == 5e-4
    assert build({"preset": "tiny"}, {"learning_rate": 1e-3}).learning_rate == 1e-3


def test_one_number_for_the_view():
    assert build({"view_size": 64}).view_size == (64, 64, 64)
    assert build({"view_size": [64]}).view_size == (64, 64, 64)
    assert build({"view_size": [64, 96, 32]}).view_size == (64, 96, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iteration": 5}, "unknown setting 'iteration'"),
        ({"network.depth": 5}, "unknown setting 'network.depth'"),
        ({"iterations": "many"}, "'iterations' must be like 250000, got 'many'"),
        ({"iterations": 2.5}, "must be like 250000"),
        ({"body_children": 1}, "must be like True"),
        ({"n_children": 4}, r"must be like \[4, 4\]"),
        ({"mask_ratios": [0.5, "x", 0.5]}, "mask_ratios"),
        ({"network": 5}, "must hold sizes"),
        ({"preset": "huge"}, "unknown preset 'huge'"),
        ({"view_size": [96, 96]}, "one number or three"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(MiMError, match=message):
        build(settings)


def test_what_a_run_writes_can_be_read_again(tmp_path):
    config = build({"preset": "small", "learning_rate": 3e-4, "mirror_axes": [0, 1], "network.depths": [1, 2, 3, 4]})
    write_config(config, tmp_path / "config.yaml")
    assert build(read_yaml(tmp_path / "config.yaml")) == config
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2.5E+1", 25.0), ("0.1", 0.1), ("-1e2", -100.0)])
def test_yaml_numbers_with_an_exponent(tmp_path, text, value):
    (tmp_path / "run.yaml").write_text(f"weight_decay: {text}\nnetwork: {{mlp_ratio: {text}}}\n")
    assert read_yaml(tmp_path / "run.yaml") == {"weight_decay": value, "network": {"mlp_ratio": value}}


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just words", "", "1: 2", "a: 1\na: 2", "b: {a: 1, a: 2}"])
def test_files_that_are_no_settings(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(MiMError, match=r"run\.yaml"):
        read_yaml(tmp_path / "run.yaml")
    with pytest.raises(MiMError, match="cannot read"):
        read_yaml(tmp_path / "none.yaml")


def test_a_run_from_a_file_and_one_from_flags_are_the_same(write_dataset, small_runs, tmp_path, capsys):
    write_dataset(n=2)
    (tmp_path / "run.yaml").write_text("iterations: 9\nval_crops: 1\nlearning_rate: 1e-3\nseed: 3\n")
    assert small_runs.here("-o", "file", "--config", str(tmp_path / "run.yaml"), "--iterations", "2") == 0
    flags = ("--iterations", "2", "--lr", "0.001", "--seed", "3", "--set", "val_crops=1")
    assert small_runs.here("-o", "flags", *flags) == 0
    assert small_runs.rows("file") == small_runs.rows("flags")
    saved = yaml.safe_load((small_runs.folder("file") / "config.yaml").read_text())
    assert (saved["iterations"], saved["seed"], saved["val_crops"]) == (2, 3, 1)
    again = str(small_runs.folder("file") / "config.yaml")
    assert small_runs.here("-o", "again", "--config", again) == 0
    assert small_runs.rows("file") == small_runs.rows("again")


def test_every_setting_has_a_default_and_a_note():
    for cls in (PretrainConfig, NetworkConfig):
        for field in dataclasses.fields(cls):
            assert {field.default, field.default_factory} != {dataclasses.MISSING}, field.name
            by_data = field.name in ("network", "architecture", "in_channels")
            assert by_data or field.metadata.get("meaning"), f"{cls.__name__}.{field.name} says nothing"


def test_the_page_of_settings_is_up_to_date():
    assert all_settings_table() in DOCS.read_text()
