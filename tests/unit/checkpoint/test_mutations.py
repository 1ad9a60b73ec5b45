"""Files of checkpoints changed at random: what is taken passes checks of its own, all else is refused in one line."""

import copy
import json
import math
import re
import struct
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.checkpoint.format import build_checkpoint, load_checkpoint
from nnunet_mim.checkpoint.locate import CONFIG, WEIGHTS
from nnunet_mim.checkpoint.share import export
from nnunet_mim.config import PretrainConfig
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.pretraining.report.summary import Facts

WHOLE = (
    ..., None, True, False, 0, -1, 1, 3, 10**9, 2**62, 2**70, 0.5, -0.5, -0.0, 1.5, 1e308, float("nan"), float("inf"),
    "", "all", "0", "-1", "x", "x" * 500, "\x1b[2J\n", "CTNormalization", "resenc", "cosine", "unet", "native", [], {},
    [[]], [1], [0, 0, 0], [3.0, 3.0, 3.0], [2, 1, 0], [1, 1, 1], [2, 2, 2], ["a", "b"], {"0": {}}, {"a": 1}, [None],
    [[[1]]], [96, 96, 96], [32] * 3, [0.5], [0.5] * 3, [-1.0] * 3, {"mean": 0.0, "std": 0.0},
    [{"dataset": "D", "case": "c", "sha256": ""}], [{"dataset": "D", "case": "c", "sha256": "xyz"}],
)  # fmt: skip
OF_TORCH = ({0: 1}, (1, 2, 3), b"bytes", torch.ones(2))
"""what JSON does not know"""
SHARES = st.floats(0, 1, exclude_max=True)
DOCUMENTS = ("mim_config", "provenance", "nnssl_adaptation_plan", "mim_version")
CASE = {"dataset": "D", "case": "c", "sha256": "0" * 64, "image_sha256": "1" * 64, "fingerprint": "AAAA"}


@pytest.fixture(scope="module")
def stored():
    """A checkpoint with all that may be in its provenance, as a dict."""
    from nnunet_mim.config import NetworkConfig

    network = NetworkConfig((6, 6, 6, 12), (1, 1, 1, 1), 2, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2)
    row = {"val/loss": 1.5, "val/level1/reconstruction": 0.8, "baseline/level1/token_mean": 1.0, "val/probe/dice": None}
    provenance = {
        "datasets": ["Dataset900_Tiny"], "plans_name": "tinyPlans", "configuration": "3d_fullres", "fold": 0,
        "spacing": [3.0, 2.5, 4.0], "transpose_forward": [0, 1, 2], "normalization": ["CTNormalization"],
        "intensity_properties": {
            "0": {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0, "max": None}
        },
        "iterations": 1750, "image_reader_writer": "SimpleITKIO", "note": "a", "converted_from": "b",
        "loss_history": [{"iteration": 250.0 * i, **row} for i in range(3)], "cases": [CASE] * 2,
        "crops_seen": {"Dataset900_Tiny": 30}, "skipped_steps": [{"iteration": 5, "cases": ["c"]}],
    }  # fmt: skip
    config = PretrainConfig(preset="tiny", network=network, view_size=(32, 32, 32), iterations=2000)
    return build_checkpoint(MaskInMask(network, 1).state_dict(), config, provenance)


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def is_whole(value, least=0):
    return type(value) is int and least <= value < 2**63


def is_text(value):
    return type(value) is str


def all_of(kind, check, *length):
    return lambda value: type(value) is kind and (not length or len(value) in length) and all(
        map(check, value.values() if kind is dict else value)
    )  # fmt: skip


def is_hash(value):
    return is_text(value) and bool(re.fullmatch("[0-9a-f]{0,64}", value))


def or_none(check):
    return lambda value: value is None or check(value)


def is_float(value):
    return type(value) in (int, float)


def is_row(value):
    return all_of(dict, or_none(is_float))(value) and is_number(value["iteration"]) and value["iteration"] >= 0


def is_record(value):
    optional = ("image_sha256", is_hash), ("fingerprint", is_text)
    needed = is_text(value["dataset"]) and is_text(value["case"]) and is_hash(value["sha256"])
    return needed and all(check(value[name]) for name, check in optional if name in value)


def is_skipped(value):
    return is_whole(value["iteration"]) and all_of(list, is_text)(value["cases"])


PROVENANCE = {
    "datasets": all_of(list, is_text), "plans_name": is_text, "configuration": is_text,
    "fold": lambda v: is_whole(v) or (is_text(v) and (v == "all" or v.isdigit())),
    "spacing": all_of(list, lambda v: is_number(v) and v > 0, 0, 3),
    "transpose_forward": lambda v: type(v) is list and sorted(v) == [0, 1, 2] and True not in map(id, v),
    "normalization": all_of(list, is_text, 1), "image_reader_writer": is_text, "note": is_text,
    "intensity_properties": all_of(dict, all_of(dict, or_none(is_float))), "converted_from": is_text,
    "iterations": is_whole, "loss_history": all_of(list, is_row), "cases": all_of(list, is_record),
    "crops_seen": all_of(dict, is_whole), "skipped_steps": all_of(list, is_skipped),
}  # fmt: skip
NEEDED = {*PROVENANCE} - {"transpose_forward", "image_reader_writer", "note", "converted_from", "crops_seen",
                          "skipped_steps"}  # fmt: skip


def is_provenance(content):
    window = content["intensity_properties"].get("0", {})
    values = [window.get(name) for name in ("percentile_00_5", "percentile_99_5", "mean", "std")]
    is_ct = content["normalization"] == ["CTNormalization"]
    right = not is_ct or (all(map(is_number, values)) and values[0] < values[1] and values[3] > 0)
    return right and {*content} >= NEEDED and all(PROVENANCE[key](v) for key, v in content.items() if key in PROVENANCE)


def share(value):
    return is_number(value) and 0 <= value <= 1


def least(low):
    return lambda value: is_number(value) and value >= low


def above(low):
    return lambda value: is_number(value) and value > low


def one_of(*names):
    return lambda value: is_text(value) and value in names


def three(check):
    return all_of(list, check, 3)


SETTINGS = {
    "preset": is_text, "encoder": one_of("hybrid"), "architecture": lambda v: type(v) is dict, "decoder": one_of("mim"),
    "decoder_phase": lambda v: share(v) and v > 0, "unet_every": lambda v: is_whole(v, 1),
    "unet_views": three(is_whole), "unet_weight": least(0), "in_channels": lambda v: v == 1 and is_whole(v),
    "view_size": three(lambda v: is_whole(v, 32) and v % 32 == 0 and v <= 512), "ladder": one_of("published", "native"),
    "scale": three(lambda v: is_whole(v) and v in (1, 2)), "mask_ratios": three(lambda v: share(v) and 0 < v < 1),
    "n_children": all_of(list, lambda v: is_whole(v, 1), 2), "alignment": one_of("infonce", "cosine", "none"),
    "alignment_weight": least(0), "temperature": above(0), "level_weights": three(least(0)), "init_checkpoint": is_text,
    "iterations": lambda v: is_whole(v, 1), "batch_size": lambda v: is_whole(v, 1), "learning_rate": above(0),
    "warmup_fraction": lambda v: share(v) and v < 1, "weight_decay": least(0),
    "betas": all_of(list, lambda v: share(v) and v < 1, 2), "grad_clip": above(0), "body_fraction": share,
    "dataset_temperature": above(0), "body_children": lambda v: type(v) is bool,
    "mirror_axes": all_of(list, lambda v: is_whole(v) and v < 3), "val_cases": lambda v: is_whole(v, 1),
    "val_every": lambda v: is_whole(v, 1), "val_crops": lambda v: is_whole(v, 1),
    "save_every": lambda v: is_whole(v, 1), "probe_every": is_whole,
    "probe_cases": all_of(list, lambda v: is_whole(v, 1), 2), "max_skipped": is_whole, "seed": is_whole,
}  # fmt: skip


def is_right(content, original):
    """Whether settings and provenance are as docs/checkpoint.md and docs/config.md say, and the network as it was."""
    config = content["mim_config"]
    same = {key: config["network"].get(key, value) for key, value in original["mim_config"]["network"].items()}
    network = same == original["mim_config"]["network"] and {*config["network"]} <= {*same}
    others = {key: value for key, value in config.items() if key != "network"}
    settings = {*others} <= {*SETTINGS} and all(SETTINGS[key](value) for key, value in others.items())
    return network and settings and is_provenance(content["provenance"])


def read(path):
    """What mim_inspect, mim_export and a run that is continued take from a checkpoint."""
    content = load_checkpoint(path)
    Facts(content, path)
    return content


def same_documents(found, written):
    """Settings and provenance are what was written, NaN too. The rest is for other software (docs/checkpoint.md)."""
    return all(repr(found[name]) == repr(written[name]) for name in ("mim_config", "provenance"))


def change(junk, documents, share, value):
    """Documents with junk in one place below the top of one of them."""
    return junk.put(documents, junk.at(documents, share), value)


def test_metadata(stored, junk, examples, tmp_path):
    documents, path = {name: stored[name] for name in DOCUMENTS}, tmp_path / "a.pth"
    junk_values = st.sampled_from(range(len(WHOLE + OF_TORCH)))
    taken = []

    @examples(30, 400)
    @given(share=SHARES, number=junk_values)
    def holds(share, number):
        content = change(junk, documents, share, (WHOLE + OF_TORCH)[number])
        torch.save({"network_weights": stored["network_weights"], **content}, path)
        found = junk.taken(read, path)
        if found is not None:
            assert is_right(content, stored), junk.at(documents, share)
            assert same_documents(found, content)
        taken.append(found is not None)

    holds()
    assert {*taken} == {True, False}, "some are taken and some refused"


@pytest.fixture
def exported(stored, tmp_path):
    """Folder of an export."""
    export(copy.deepcopy(stored), "card", tmp_path / "a", with_names=True)
    return tmp_path / "a"


def test_config_of_an_export(stored, exported, junk, examples):
    """Another checksum, or another key, is refused too."""
    whole = json.loads((exported / CONFIG).read_text())

    @examples(30, 400)
    @given(share=SHARES, number=st.sampled_from(range(len(WHOLE))))
    def holds(share, number):
        content = change(junk, whole, share, WHOLE[number])
        (exported / CONFIG).write_text(json.dumps(content))
        found = junk.taken(read, exported)
        if found is not None:
            assert content["sha256"] == whole["sha256"]
            assert is_right(content, whole), junk.at(whole, share)
            assert same_documents(found, content)

    holds()


def tensors_in(content):
    """Tensors by name in bytes of safetensors, by its specification."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kinds = {"F32": np.float32, "F16": np.float16, "I64": np.int64}
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


HEADERS = (
    ..., None, True, 0, -1, 1, 4, 12, 48, 2**31, 2**62, 0.5, "", "F32", "F16", "I64", "BF16", "F64", "x", [], {}, [1],
    [0], [0, 0], [0, 4], [0, 48], [12], [1, 12], [12, 1], [0, 2**40], [-4, 0], {"format": "pt"},
    {"dtype": "F32", "shape": [], "data_offsets": []},
)  # fmt: skip


def test_header_of_safetensors(stored, exported, junk, examples):
    whole, config = (exported / WEIGHTS).read_bytes(), json.loads((exported / CONFIG).read_text())
    (size,) = struct.unpack("<Q", whole[:8])
    header, shapes = json.loads(whole[8 : 8 + size]), {k: v.shape for k, v in stored["network_weights"].items()}

    @examples(40, 400)
    @given(share=SHARES, value=st.sampled_from(HEADERS), length=st.sampled_from([0, 0, 0, 0, 0, -1, 1, 2**20, 2**62]))
    def holds(share, value, length):
        new = json.dumps(change(junk, header, share, value)).encode()
        content = struct.pack("<Q", len(new) + length) + new + whole[8 + size :]
        (exported / WEIGHTS).write_bytes(content)
        (exported / CONFIG).write_text(json.dumps({**config, "sha256": sha256(content).hexdigest()}))
        found = junk.taken(read, exported)
        if found is not None:
            wanted, weights = tensors_in(content), found["network_weights"]
            assert {name: value.shape for name, value in weights.items()} == shapes
            assert wanted.keys() == weights.keys()
            assert all(np.array_equal(weights[name].numpy(), value) for name, value in wanted.items())

    holds()


def test_bytes_of_safetensors(stored, exported, junk, examples):
    """Any byte of the weights is covered by the checksum."""
    whole = (exported / WEIGHTS).read_bytes()

    @examples(30, 200)
    @given(share=SHARES, byte=st.integers(1, 255))
    def holds(share, byte):
        content = bytearray(whole)
        content[int(share * len(content))] ^= byte
        (exported / WEIGHTS).write_bytes(content)
        assert junk.taken(read, exported) is None

    holds()
