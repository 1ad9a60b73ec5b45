"""mim_convert: every tensor has its place, the result computes the same, and nothing in the file is run."""

import argparse
import json
import os
from fractions import Fraction

import pytest
import torch

from nnunet_mim.checkpoint.format import PretrainedCheckpoint
from nnunet_mim.checkpoint.published import convert_weights, our_name, read_published
from nnunet_mim.config import PRESETS, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.inspection.convert_cli import main
from nnunet_mim.networks.mask_in_mask import MaskInMask


@pytest.fixture(scope="module")
def shapes(golden_folder):
    return {key: tuple(shape) for key, shape in json.loads((golden_folder / "published_keys.json").read_text()).items()}


@pytest.fixture(scope="module")
def published(shapes, reference):
    return reference.golden.checkpoint(shapes, reference.network.sincos)


@pytest.fixture(scope="module")
def published_file(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "official.pth"
    torch.save(published, path)
    return path


def test_every_published_tensor_has_a_place_and_every_parameter_a_source(shapes):
    assert len(shapes) == 363
    computed = {"pos_embed", "decoder_pos_embed"}
    assert {key for key in shapes if our_name(key) is None} == computed
    with torch.device("meta"):
        parameters = MaskInMask(PRESETS["base"]).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in parameters.items()} == {
        our_name(key): shape for key, shape in shapes.items() if key not in computed
    }


def test_command_writes_a_checkpoint_that_the_trainer_reads(published, published_file, tmp_path, capsys):
    out = tmp_path / "out.pth"
    assert main([str(published_file), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "363 tensors: 361 converted" in said
    assert "licence" in said
    read = PretrainedCheckpoint.load(out)
    assert (read.network, read.in_channels, read.preset) == (PRESETS["base"], 1, "base")
    assert torch.equal(read.encoder["vit_blocks.3.attn.qkv.weight"], published["model"]["blocks4.3.attn.qkv.weight"])
    window = read.provenance["intensity_properties"]["0"]
    assert (window["percentile_00_5"], window["percentile_99_5"], window["mean"], window["std"]) == (
        -1000,
        1000,
        0,
        250,
    )
    stored = torch.load(out, weights_only=True)
    assert "licence" in stored["provenance"]["note"]
    assert PretrainConfig.from_dict(stored["mim_config"]) == PretrainConfig(preset="base")


@pytest.mark.parametrize("window", [(-1000.0, 1000.0), (-175.0, 250.0)])
def test_first_convolution_takes_the_new_units(published, window):
    """By hand: one 2x2x2 cell through W·u + b and through the converted W'·v + b'."""
    model = published["model"]
    converted = convert_weights(model, window)
    weight, bias = model["patch_embed1.proj.weight"].double(), model["patch_embed1.proj.bias"].double()
    hounsfield = torch.linspace(-900, 700, 8, dtype=torch.float64).reshape(2, 2, 2)
    u, v = (hounsfield - window[0]) / (window[1] - window[0]), hounsfield / 250
    name = "encoder.stages.0.embed.proj"
    for channel in (0, 17, 47):
        wanted = (weight[channel, 0] * u).sum() + bias[channel]
        found = (converted[f"{name}.weight"][channel, 0].double() * v).sum() + converted[f"{name}.bias"][channel]
        assert float(found) == pytest.approx(float(wanted), abs=1e-5)


class Malicious:
    """Makes a folder when unpickled without care."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("where", ["top", "args"])
def test_file_with_code_is_refused_by_name_and_not_run(tmp_path, capsys, new_format, where):
    trap = tmp_path / "trap"
    content = {"model": {"mask_token": torch.zeros(1, 1, 576)}, "args": argparse.Namespace()}
    if where == "top":
        content["hook"] = Malicious(trap)
    else:
        content["args"].hook = Malicious(trap)
    path = tmp_path / "bad.pth"
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    assert main([str(path), "-o", str(tmp_path / "out.pth")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert f"{os.mkdir.__module__}.mkdir" in error
    assert not trap.exists()
    assert not (tmp_path / "out.pth").exists()


def test_namespace_is_not_a_door(tmp_path):
    """An instance of another class inside the namespace is refused as well."""
    path = tmp_path / "bad.pth"
    torch.save({"model": {}, "args": argparse.Namespace(ratio=Fraction(1, 2))}, path)
    with pytest.raises(MiMError, match=r"fractions\.Fraction"):
        read_published(path)


@pytest.mark.parametrize("protocol", [0, 1, 3, 4])
def test_code_in_any_pickle_protocol_is_refused_by_name(tmp_path, protocol):
    """Also in protocols whose operations PyTorch's safe loading does not know."""
    trap, path = tmp_path / "trap", tmp_path / "bad.pth"
    torch.save({"model": {}, "hook": Malicious(trap)}, path, pickle_protocol=protocol)
    with pytest.raises(MiMError, match=rf"refused: loading it would run.*{os.mkdir.__module__}\.mkdir"):
        read_published(path)
    assert not trap.exists()


def test_plain_pickle_and_torchscript_are_refused_not_called_damaged(tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "bad.pth"
    path.write_bytes(b"(S'%s'\nios\nmkdir\n." % str(trap).encode())  # INST, by hand
    with pytest.raises(MiMError, match=r"refused: loading it would run os\.mkdir"):
        read_published(path)
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))
    with pytest.raises(MiMError, match="is refused"):
        read_published(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor([float("nan")]), torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.int64)],
    ids=["nan", "sparse", "integers"],
)
def test_tensors_that_are_no_weights(tmp_path, tensor):
    path = tmp_path / "bad.pth"
    torch.save({"model": {"norm.weight": tensor}}, path)
    with pytest.raises(MiMError, match=r"bad\.pth"):
        read_published(path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "no model", "not tensors", "numbers for names"])
def test_unreadable_files(published_file, tmp_path, damage):
    path = tmp_path / "bad.pth"
    if damage == "truncated":
        path.write_bytes(published_file.read_bytes()[:100_000])
    elif damage == "no model":
        torch.save({"state_dict": {}}, path)
    elif damage == "not tensors":
        torch.save({"model": {"a": 1}}, path)
    elif damage == "numbers for names":
        torch.save({"model": {1: torch.zeros(1)}}, path)
    with pytest.raises(MiMError, match=str(path)):
        read_published(path)


def changed(model, key, value):
    copy = dict(model)
    if value is None:
        del copy[key]
    else:
        copy[key] = value
    return copy


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norm.weight", None, r"1 missing \(encoder\.norm\.weight\)"),
        ("pos_embed", None, r"missing \(pos_embed\)"),
        ("head.weight", torch.zeros(2), r"1 unknown tensors \(head\.weight\)"),
        ("norm.weight", torch.zeros(768), r"norm\.weight \(768,\) instead of \(384,\)"),
        ("decoder_pos_embed", torch.zeros(1, 216, 576), r"decoder_pos_embed is not the fixed"),
        ("pos_embed", torch.zeros(1, 215, 384), r"pos_embed is not the fixed"),
        ("pos_embed", torch.zeros(384), r"pos_embed is not the fixed"),
        ("patch_embed1.proj.weight", torch.zeros(48), r"patch_embed1\.proj\.weight \(48,\) instead of"),
    ],
)
def test_another_architecture(published, key, value, message):
    with pytest.raises(MiMError, match=message):
        convert_weights(changed(published["model"], key, value))


def test_all_unknown_tensors_are_counted(published):
    model = {**published["model"], "head.weight": torch.zeros(2), "head.bias": torch.zeros(2)}
    with pytest.raises(MiMError, match=r"2 unknown tensors \(head\.weight, head\.bias\)"):
        convert_weights(model)


def test_bad_command_lines(published_file, tmp_path, capsys):
    existing = tmp_path / "out.pth"
    existing.write_text("mine")
    assert main([str(published_file), "-o", str(existing)]) == 2
    assert existing.read_text() == "mine"
    assert main([str(published_file), "-o", str(tmp_path / "no" / "out.pth")]) == 2
    assert main([str(published_file), "-o", str(tmp_path / "new.pth"), "--window", "250", "-175"]) == 2
    assert main([str(tmp_path / "no.pth"), "-o", str(tmp_path / "new.pth")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert all(error.startswith("error: ") for error in errors)
    assert not (tmp_path / "new.pth").exists()
