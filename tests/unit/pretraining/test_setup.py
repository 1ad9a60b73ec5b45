"""What a pretraining refuses or says before it starts: no token in the data, another network in the plans, and more."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnunet_mim.checkpoint.locate import LATEST, UNPICKLED
from nnunet_mim.config import PRESETS
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.hybrid_unet import plans_architecture
from nnunet_mim.nnunet.source import find_source, prepare_command
from nnunet_mim.pretraining import cli, loop
from nnunet_mim.pretraining.data.crops import CropDataset, read_crop
from nnunet_mim.pretraining.options import DataOptions
from nnunet_mim.pretraining.setup import _resumable_checkpoint

ARGS = ("-d", "900", "-p", "tinyPlans", "-device", "cpu", "--batch", "1", "--workers", "0", "--children", "2", "1")
SMALL = (*ARGS, "--preset", "tiny", "--view", "32", "--scale", "2", "2", "2", "--iterations", "1")


@pytest.fixture
def refused(capsys):
    """refused(*arguments): run the command, which must fail with one line; returns it."""

    def run(*arguments):
        capsys.readouterr()
        assert cli.main([*map(str, arguments)]) == 2
        (line,) = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error: ")]
        return line

    return run


@pytest.fixture
def run_of(monkeypatch):
    """run_of(*arguments): the Run that a command would train."""

    def run(*arguments):
        runs = []

        def stop(job, _):
            runs.append(job)
            raise MiMError("everything is set up")

        with monkeypatch.context() as patch:
            patch.setattr(loop, "pretrain", stop)
            assert cli.main([*map(str, arguments)]) == 2
        return runs[0]

    return run


@pytest.fixture
def write_small_cases(write_dataset, save_case):
    """write_small_cases(*shapes): a dataset whose cases have these shapes."""

    def write(*shapes):
        folder = write_dataset(n=0)
        for number, shape in enumerate(shapes):
            save_case(folder, f"case_{number:02d}", np.random.default_rng(number).normal(size=(1, *shape)))
        return folder

    return write


@pytest.fixture
def with_plans():
    """with_plans(folder, change): change the plans of `write_dataset`'s folder; change gets the configuration."""

    def change_plans(folder, change):
        path = folder.parent / "tinyPlans.json"
        plans = json.loads(path.read_text())
        change(plans["configurations"]["3d_fullres"], plans)
        path.write_text(json.dumps(plans))

    return change_plans


def hybrid(preset):
    """A change of plans: what mim_plan --preset writes."""

    def change(configuration, plans):
        configuration["architecture"] = plans_architecture(PRESETS[preset], configuration["patch_size"])

    return change


# --- a level without a token ---------------------------------------------------------------------------------------


def test_cases_smaller_than_a_token_are_refused_and_the_remedy_works(write_small_cases, refused, run_of):
    """Tokens of level 1 are 32 voxels with --scale 2, and 16 with --scale 1: cases of 24 have none of the former."""
    write_small_cases((24, 40, 40), (24, 40, 40), (24, 40, 40))
    line = refused(*SMALL)
    assert "level 1 has nothing to learn: its tokens are made of 32 x 32 x 32 voxels (axes as in the plans)" in line
    assert line.endswith("the largest case has 24 x 40 x 40: add --scale 1 1 1")
    assert run_of(*SMALL, "--scale", "1", "1", "1").config.scale == (1, 1, 1)


def test_cases_without_any_token_need_finer_voxels(write_small_cases, refused, parsed_commands):
    write_small_cases((12, 40, 40), (40, 12, 40), (40, 40, 8))
    line = refused(*SMALL, "--scale", "1", "1", "1")
    assert "its tokens are made of 16 x 16 x 16 voxels" in line
    (given,) = parsed_commands(line)
    assert (given.d, given.p) == (["900"], "NAME")
    assert [3.0 * 12 / mm >= 16 for mm in given.s] == [True] * 3, "the cases are 36 mm long there"


def test_one_large_case_is_enough(write_small_cases, run_of):
    """The held-out one does not count: it is not trained on."""
    write_small_cases(*[(12, 40, 40)] * 3, (40, 40, 40), (40, 41, 40))
    assert run_of(*SMALL).config.scale == (2, 2, 2)


def test_a_level_that_is_not_trained_needs_no_token(write_small_cases, run_of):
    write_small_cases(*[(24, 40, 40)] * 3)
    assert run_of(*SMALL, "--set", "level_weights=0,1,1").config.level_weights == (0, 1, 1)


# --- the network of the plans ----------------------------------------------------------------------------------------


def test_the_network_is_that_of_mim_plans(write_dataset, with_plans, run_of):
    """Without --preset; base would train for days, and the trainer refuse it."""
    with_plans(write_dataset(n=3), hybrid("tiny"))
    small = [*ARGS, "--view", "32", "--scale", "2", "2", "2"]
    run = run_of(*small)
    assert (run.config.preset, run.config.network) == ("tiny", PRESETS["tiny"])
    assert run.config.learning_rate == 5e-4, "what the preset decides follows"
    assert run_of(*small, "--config", run.folder / "config.yaml", "-o", "again").config == run.config


def test_stock_plans_leave_the_choice_of_the_network(write_dataset, run_of):
    write_dataset(n=3)
    small = [*ARGS, "--view", "32", "--scale", "2", "2", "2"]
    assert run_of(*small).config.network == PRESETS["base"]
    assert run_of(*small, "--preset", "small").config.network == PRESETS["small"]


def test_sizes_in_the_plans_that_no_preset_has(write_dataset, with_plans, run_of, refused):
    network = replace(PRESETS["tiny"], depths=(1, 1, 1, 3))

    def change(configuration, plans):
        configuration["architecture"] = plans_architecture(network, configuration["patch_size"])

    with_plans(write_dataset(n=3), change)
    found = run_of(*ARGS, "--view", "32", "--scale", "2", "2", "2").config.network
    assert (found.embed_dims, found.depths) == (network.embed_dims, network.depths)
    assert "an encoder with depths (1, 1, 1, 3) (no preset), and cannot finetune one with (2, 2, 2, 11)" in refused(
        *ARGS, "--preset", "tiny"
    )


def test_another_preset_than_that_of_the_plans_is_refused_with_a_command(
    write_dataset, with_plans, refused, parsed_commands, tmp_path
):
    folder = write_dataset(n=3)
    with_plans(folder, hybrid("tiny"))
    line = refused(*ARGS, "--preset", "small")
    assert "name an encoder with embed_dims (12, 24, 48, 96) (preset tiny)" in line
    (given,) = parsed_commands(line)
    assert (given.d, given.o, given.c, given.preset) == ("900", "tinyPlans", "3d_fullres", "small")
    (folder.parent / "mim_prepare").mkdir()
    (folder.parent / "mim_prepare" / f"{folder.name}.jsonl").touch()  # it is mim_prepare that makes these cases
    (given,) = parsed_commands(refused(*ARGS, "--preset", "small"))
    assert (given.d, given.p, given.s, given.preset) == (["900"], "tinyPlans", [3.0, 3.0, 3.0], "small")
    assert "name an encoder with depths" in refused(*ARGS, "--set", "network.depths=1,1,1,1")
    assert not (tmp_path / "results").exists()


def test_datasets_whose_plans_name_different_networks(write_dataset, with_plans, refused):
    with_plans(write_dataset(n=3), hybrid("tiny"))
    with_plans(write_dataset(n=3, number=901), hybrid("small"))
    line = refused("-d", "900", "901", *ARGS[2:])
    assert "tinyPlans of Dataset901_Tiny name an encoder with embed_dims (24, 48, 96, 192) (preset small)" in line


def test_an_interrupted_run_keeps_its_network(write_dataset, with_plans, interrupted_run, run_of):
    """Also one that was started with another network than the plans have."""
    folder = write_dataset(n=3)
    options = ("--iterations", "2", "--save_every", "1")
    interrupted_run(*options, after=1)
    with_plans(folder, hybrid("small"))
    assert run_of(*SMALL, *options, "--c").config.preset == "tiny"


# --- everything else -------------------------------------------------------------------------------------------------


def test_a_dataset_that_is_given_twice(write_dataset, refused):
    write_dataset(n=3)
    line = refused("-d", "900", "Dataset900_Tiny", *ARGS[2:])
    assert "-d 900 Dataset900_Tiny: Dataset900_Tiny is there twice, leave out Dataset900_Tiny" in line


def test_a_cascade_is_refused_as_by_the_trainer(write_dataset, with_plans, refused):
    def add_cascade(configuration, plans):
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}

    with_plans(write_dataset(n=3), add_cascade)
    line = refused(*ARGS, "-c", "3d_cascade_fullres")
    assert "configuration 3d_cascade_fullres is a cascade, unknown to MiM: use 3d_fullres" in line


@pytest.mark.parametrize(
    ("flags", "settings", "alike"),
    [
        (("--iterations", "4"), "iterations=1", False),
        (("--iterations", "4"), "iterations=4", True),
        (("--view", "32"), "view_size=32,32,32", True),
        (("--view", "32"), "view_size=32,32,64", False),
        (("--mirror_axes", "1"), "mirror_axes=[]", False),
    ],
)
def test_a_setting_that_is_given_twice(write_dataset, refused, flags, settings, alike):
    write_dataset(n=1)  # too few cases: nothing is trained
    line = refused(*ARGS, "--preset", "tiny", "--scale", "2", "2", "2", *flags, "--set", settings)
    assert ("different values: give one" in line) != alike


def test_a_misspelt_validation_case_is_not_trained_on(write_dataset, refused):
    folder = write_dataset(n=5)
    path = folder.parent / "splits_final.json"
    path.write_text(json.dumps([{"train": ["case_00"], "val": ["case_O1"]}]))
    assert f"{path} names 1 cases in fold 0 that are not in {folder}, case_O1 first" in refused(*SMALL, "-f", "0")


@pytest.mark.parametrize("splits", ["null", "{}", '[{"train": ["case_00"], "val": []}]'])
def test_a_split_that_is_none(write_dataset, refused, splits):
    path = write_dataset(n=5).parent / "splits_final.json"
    path.write_text(splits)
    assert str(path) in refused(*SMALL, "-f", "0")


def test_cases_that_were_left_out_on_purpose_are_said(write_dataset, run_of, capsys):
    folder = write_dataset(n=5)
    splits = [{"train": ["case_00"], "val": ["case_01", "thin"]}]
    (folder.parent / "splits_final.json").write_text(json.dumps(splits))
    (folder.parent / "mim_prepare").mkdir()
    log = folder.parent / "mim_prepare" / f"{folder.name}.jsonl"
    log.write_text(json.dumps({"case": "thin", "reason": "fewer than 16 slices"}))
    run_of(*SMALL, "-f", "0")
    assert "warning: Dataset900_Tiny: mim_prepare has left out validation cases: thin\n" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["another", "vanished"])
def test_a_case_that_is_swapped_during_a_run_is_not_read(write_dataset, save_case, run_of, change):
    """As sound as before, but another one: its hash would be wrong in the checkpoint."""
    folder = write_dataset(n=4)
    data = run_of(*SMALL).data
    crops = CropDataset(data.train, (32, 32, 32))
    before = {number: crops[number] for number in range(8)}
    name = crops.case_of(2).info.case
    if change == "another":
        save_case(folder, name, np.random.default_rng(0).normal(size=(1, 48, 48, 48)))
    else:
        (folder / f"{name}.b2nd").unlink()
    for number, (crop, _, missed) in before.items():
        crop_now, _, missed_now = crops[number]
        unread = [data.train[i].info.case for i in missed_now.tolist() if i >= 0]
        assert set(unread) <= {name}
        assert torch.equal(crop, crop_now) == (not unread)
        assert not (missed >= 0).any()
    assert (crops[2][2] >= 0).any()
    with pytest.raises(MiMError, match="as it was when the run began: bring the former file back"):
        read_crop(next(case for case in data.train if case.info.case == name), np.zeros(3, int), np.full(3, 8))


@pytest.mark.long
@pytest.mark.parametrize("strict", [(), ("--strict",)])
def test_a_case_that_is_swapped_during_a_run_is_named(write_dataset, save_case, monkeypatch, capsys, strict):
    folder = write_dataset(n=4)
    original, swapped = loop.training_batches, []

    def swap(dataset, *args):
        name = dataset.case_of(2).info.case
        save_case(folder, name, np.random.default_rng(0).normal(size=(1, 48, 48, 48)))
        swapped.append(name)
        return original(dataset, *args)

    monkeypatch.setattr(loop, "training_batches", swap)
    assert cli.main([*SMALL, "--iterations", "4", *strict]) == (2 if strict else 0)
    said = "".join(capsys.readouterr())
    assert f"Dataset900_Tiny {swapped[0]} has changed or cannot be read any more" in said


def test_the_next_command_names_what_a_tagged_run_needs(tmp_path):
    untagged = DataOptions(("900",), plans="P", configuration="3d_lowres", fold="2")
    expected = "nnUNetv2_train Dataset900_X 3d_lowres 2 -tr nnUNetTrainerMiM -p P"
    assert cli.next_command(tmp_path, untagged, "Dataset900_X", "hybrid") == expected
    tagged = DataOptions(("900",), plans="P", configuration="3d_lowres", fold="2", tag="x")
    named = cli.next_command(tmp_path, tagged, "Dataset900_X", "hybrid")
    assert named == f"nnUNet_mim_checkpoint={tmp_path} {expected}"
    command, _, caveat = cli.next_command(tmp_path, tagged, "Dataset900_X", "resenc").partition("  # ")
    assert "-pretrained_weights" in command
    assert caveat == UNPICKLED


def test_spacing_in_a_command_is_in_the_order_that_it_takes(write_dataset, with_plans, parsed_commands):
    """The plans put the x axis first."""
    folder = write_dataset(n=1, spacing=(1.0, 4.6875, 3.0))
    with_plans(folder, lambda _, plans: plans.update(transpose_forward=[2, 0, 1], transpose_backward=[1, 2, 0]))
    source = find_source("900", "tinyPlans", "3d_fullres")
    assert source.spacing_zyx == (4.6875, 3.0, 1.0)
    (given,) = parsed_commands(prepare_command([source, source]))
    assert (given.d, given.s) == (["900", "900"], [4.6875, 3.0, 1.0])


def test_a_command_that_prepares_anew_keeps_the_network_of_the_plans(write_dataset, with_plans, parsed_commands):
    def tiny(_, plans):
        block = plans_architecture(PRESETS["tiny"], (32, 32, 32))
        plans["configurations"]["3d_fullres"]["architecture"] = block

    folder = write_dataset(n=1)
    (given,) = parsed_commands(prepare_command([find_source("900", "tinyPlans", "3d_fullres")]))
    assert given.preset is None
    with_plans(folder, tiny)
    (given,) = parsed_commands(prepare_command([find_source("900", "tinyPlans", "3d_fullres")]))
    assert given.preset == "tiny"


def test_settings_of_an_interrupted_run_that_cannot_be_name_the_file(make_checkpoint, tmp_path):
    path, _ = make_checkpoint(tmp_path / "run" / LATEST, resume_state={"optimizer": {}})
    assert _resumable_checkpoint(path.parent)["resume_state"] == {"optimizer": {}}
    stored = torch.load(path, weights_only=True)
    stored["mim_config"]["decoder_phase"] = 0.0
    torch.save(stored, path)
    with pytest.raises(MiMError, match=rf"^{path}, mim_config: --decoder_phase must be above 0 and at most 1, got 0"):
        _resumable_checkpoint(path.parent)
