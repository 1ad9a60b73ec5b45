"""Files of others that name a command where a network belongs: every command ends in one line, and runs none of it."""

import contextlib
import json
import pickle
from hashlib import sha256

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from safetensors.torch import save

from nnunet_mim.checkpoint.format import build_checkpoint
from nnunet_mim.checkpoint.locate import CONFIG, LATEST, WEIGHTS
from nnunet_mim.classification.cli import main as mim_classify
from nnunet_mim.config import PretrainConfig
from nnunet_mim.inspection.cli import main as mim_inspect
from nnunet_mim.inspection.convert_cli import main as mim_convert
from nnunet_mim.inspection.export_cli import main as mim_export
from nnunet_mim.networks.build import build_network
from nnunet_mim.preparation.cli import main as mim_plan
from nnunet_mim.pretraining.cli import main as mim_pretrain

PLACES = ("nonlin", "norm_op", "dropout_op", "conv_op", "network_class_name", "_kw_requires_import")
PRETRAIN = ["-d", "900", "-p", "tinyPlans", "-device", "cpu", "--workers", "0"]
N_CASES = 4
RESENC = ["--encoder", "resenc", "--view", "32"]


@pytest.fixture
def refused(canary, capfd):
    """refused(main, *arguments, file=…): a command that ends with the one line that names a file, and runs nothing."""

    def run(main, *arguments, file):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capfd.readouterr().err
        assert not canary.file.exists()
        assert code == 2
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert said[:-1].isprintable()
        assert str(file) in said, said
        return said

    return run


@pytest.fixture
def stored(network_config, canary):
    """stored(place): checkpoint of a residual encoder as a dict, its settings poisoned in a place; None: sound."""
    settings = {"preset": "tiny", "network": network_config, "view_size": (32, 32, 32), "encoder": "resenc"}
    config = PretrainConfig(**settings, architecture=canary.clean)
    provenance = {
        "datasets": ["Dataset900_Tiny"], "plans_name": "tinyPlans", "configuration": "3d_fullres", "fold": "all",
        "spacing": [3.0] * 3, "transpose_forward": [0, 1, 2], "normalization": ["CTNormalization"],
        "intensity_properties": {"0": {"percentile_00_5": -1e3, "percentile_99_5": 1e3, "mean": 0.0, "std": 250.0}},
        "iterations": 5, "loss_history": [], "cases": [],
    }  # fmt: skip

    def make(place):
        content = build_checkpoint(build_network(config).state_dict(), config, provenance)
        if place is not None:
            content["mim_config"]["architecture"] = block = canary.poisoned(place)
            plans = content["nnssl_adaptation_plan"]["architecture_plans"]
            plans["arch_class_name"], plans["arch_kwargs"] = block["network_class_name"], block["arch_kwargs"]
            plans["arch_kwargs_requiring_import"] = block["_kw_requires_import"]
        return content

    return make


@pytest.fixture
def write_file(stored, tmp_path):
    """write_file(place, path=…): such a checkpoint as a file."""

    def write(place, path=tmp_path / "foreign.pth"):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**stored(place), "resume_state": {}}, path)
        return path

    return write


@pytest.fixture
def write_export(stored, tmp_path):
    """write_export(place): such a checkpoint as a folder of mim_export, which writes none of a residual encoder."""

    def write(place):
        content, folder = stored(place), tmp_path / "foreign"
        folder.mkdir(exist_ok=True)
        weights = save({name: value.clone() for name, value in content.pop("network_weights").items()})
        (folder / WEIGHTS).write_bytes(weights)
        (folder / CONFIG).write_text(json.dumps({"sha256": sha256(weights).hexdigest(), **content}))
        return folder

    return write


@pytest.fixture
def planned(write_dataset, canary):
    """planned(place): plans of a preprocessed dataset whose network is poisoned in a place; the path of their file."""
    base = write_dataset(n=N_CASES, shape=(24, 24, 24)).parent
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (base / "dataset.json").write_text(json.dumps({**description, "numTraining": N_CASES}))
    fingerprint = {"spacings": [[3.0] * 3], "shapes_after_crop": [[48] * 3]}
    (base / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))

    def write(place):
        plans = json.loads((base / "tinyPlans.json").read_text())
        block = canary.clean if place is None else canary.poisoned(place)
        plans["configurations"]["3d_fullres"]["architecture"] = block
        (base / "tinyPlans.json").write_text(json.dumps(plans))
        return base / "tinyPlans.json"

    return write


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("place", PLACES)
def test_nnunets_own_builder_runs_it(canary, place):
    """Without this the tests below could not fail."""
    block = canary.poisoned(place)
    arguments = block["network_class_name"], block["arch_kwargs"], block["_kw_requires_import"]
    with contextlib.suppress(AssertionError, AttributeError, ImportError, TypeError):
        get_network_from_plans(*arguments, 1, 1, allow_init=True, deep_supervision=False)
    assert canary.file.exists()


def test_what_is_poisoned_below_is_taken_where_it_is_sound(write_file, write_export, planned, canary, tmp_path, capfd):
    assert mim_inspect([str(write_file(None))]) == mim_inspect([str(write_export(None))]) == 0
    planned(None)
    assert mim_plan(["-d", "900", "-p", "tinyPlans", "--encoder", "resenc", "-o", "Mine"]) == 0
    assert not canary.file.exists()


@pytest.mark.parametrize("written_by", ["write_file", "write_export"])
def test_checkpoints_and_exports(request, written_by, refused, tmp_path):
    write, out = request.getfixturevalue(written_by), tmp_path / "out"
    for place in PLACES:
        poisoned = write(place)
        for main in (mim_inspect, mim_export, mim_convert):
            refused(main, poisoned, "-o", out, file=poisoned)
    assert not out.exists()


def test_checkpoints_to_start_from(planned, write_file, refused, tmp_path):
    planned(None)
    results = tmp_path / "results" / "Dataset900_Tiny" / "MiMPretrain__tinyPlans__3d_fullres" / "fold_all"
    for place in PLACES:
        file, latest = write_file(place), write_file(place, results / LATEST)
        refused(mim_pretrain, *PRETRAIN, *RESENC, "--init", file, "-o", "new", "--dry-run", file=file)
        refused(mim_plan, "-d", 900, "-p", "tinyPlans", "-pc", file, file=file)
        refused(mim_pretrain, *PRETRAIN, "--c", file=latest)
    assert [path.name for path in results.iterdir()] == [LATEST]


def test_settings(planned, refused, canary, tmp_path):
    planned(None)
    shared = tmp_path / "shared.yaml"
    for place in PLACES:
        content = {"encoder": "resenc", "view_size": [32] * 3, "architecture": canary.poisoned(place)}
        shared.write_text(json.dumps(content))
        refused(mim_pretrain, *PRETRAIN, "--config", shared, "--dry-run", file=shared)


def test_plans(planned, refused, canary):
    for place in PLACES:
        file = planned(place)
        refused(mim_plan, "-d", 900, "-p", "tinyPlans", "--encoder", "resenc", "-o", "Mine", file=file)
        refused(mim_pretrain, *PRETRAIN, *RESENC, "--dry-run", file=file)
        assert not file.with_name("Mine.json").exists()
        assert mim_plan(["-d", "900", "-p", "tinyPlans", "--preset", "tiny", "-o", "Ours"]) == 0, "another network"
        assert "anary" not in file.with_name("Ours.json").read_text()
        assert not canary.file.exists()


def test_classifiers(planned, write_file, refused, tmp_path):
    (tmp_path / "raw" / "Dataset900_Tiny").mkdir(parents=True)
    table = tmp_path / "labels.csv"
    table.write_text("case,ill\n" + "".join(f"case_{n:02},{n % 2}\n" for n in range(N_CASES)))
    given = ["train", "-d", 900, "-p", "tinyPlans", "--target", "ill", "--labels", table, "-device", "cpu",
             "--folds", 2, "--encoder", "resenc"]  # fmt: skip
    for place in PLACES:
        planned(None)
        file = write_file(place)
        for mode in ("probe", "finetune", "scratch"):
            refused(mim_classify, *given, "--mode", mode, "-pc", file, file=file)
        file = planned(place)
        refused(mim_classify, *given, "-pc", "none", file=file)


def test_a_poisoned_case(planned, refused, canary):
    """The command that makes the index reads plain values and arrays of the properties of a case."""
    folder = planned(None).with_name("tinyPlans_3d_fullres")
    for case in folder.glob("*.pkl"):
        case.write_bytes(pickle.dumps({"spacing": [3.0] * 3, "class_locations": {1: canary.trap}}))
    refused(mim_pretrain, *PRETRAIN, *RESENC, "--dry-run", file=folder / "case_00.pkl")
    pickle.loads((folder / "case_00.pkl").read_bytes())
    assert canary.file.exists(), "pickle itself runs it"


def test_a_file_that_runs_something_when_it_is_loaded(stored, planned, refused, canary, tmp_path):
    planned(None)
    for place in (("provenance", "note"), ("mim_config", "architecture"), ("network_weights", "encoder.stem.trap")):
        content, file = stored(None), tmp_path / "foreign.pth"
        content[place[0]][place[1]] = canary.trap
        torch.save(content, file)
        out = tmp_path / "out"
        for main, *more in ((mim_inspect, "-o", out), (mim_export, "-o", out), (mim_convert, "-o", out)):
            refused(main, file, *more, file=file)
        refused(mim_pretrain, *PRETRAIN, *RESENC, "--init", file, "--dry-run", file=file)
        refused(mim_plan, "-d", 900, "-p", "tinyPlans", "-pc", file, file=file)
        assert not out.exists()
