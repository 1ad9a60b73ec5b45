"""`mim_export`: a folder that stands for a checkpoint, read from the disk and from a server like Hugging Face's."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from nnunet_mim.benchmarking.cell import checkpoint_sha256
from nnunet_mim.benchmarking.guard import provenance_of
from nnunet_mim.checkpoint.format import PretrainedCheckpoint, build_checkpoint, load_checkpoint, save_atomically
from nnunet_mim.checkpoint.identity import leaked_cases, voxel_sha256
from nnunet_mim.checkpoint.locate import CARD, CONFIG, WEIGHTS, find_checkpoint, locate
from nnunet_mim.checkpoint.units import Units
from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.inspection.export_cli import main
from nnunet_mim.networks.mask_in_mask import MaskInMask

NETWORK = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), num_heads=2)
WINDOW = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0}
VOXELS = torch.arange(24.0).reshape(1, 2, 3, 4).numpy()


@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint_final.pth."""
    config = PretrainConfig(preset="tiny", network=NETWORK, view_size=(32, 32, 32))
    figures = {"iteration": 500, "val/level1/reconstruction": 0.412, "val/probe/dice": 0.35}
    baseline = {"baseline/level1/token_mean": 1.0, "baseline/level1/infill": 0.968}
    provenance = {
        "datasets": ["Dataset900_Tiny"], "plans_name": "tinyPlans", "configuration": "3d_fullres", "fold": 0,
        "spacing": [3.0, 2.5, 4.0], "transpose_forward": [0, 1, 2], "normalization": ["CTNormalization"],
        "intensity_properties": {"0": WINDOW}, "iterations": 500,
        "loss_history": [{"iteration": 0, "val/probe/dice": 0.2}, {**figures, **baseline}],
        "cases": [{"dataset": "Dataset900_Tiny", "case": "Mustermann_1950", "sha256": voxel_sha256(VOXELS)}],
    }  # fmt: skip
    path = tmp_path / "checkpoint_final.pth"
    save_atomically(build_checkpoint(MaskInMask(NETWORK, 1).state_dict(), config, provenance), path)
    return path


def export(checkpoint, folder, *more):
    assert main([str(checkpoint), "-o", str(folder), *more]) == 0
    return folder


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_folder_stands_for_the_checkpoint(checkpoint, tmp_path, capsys):
    folder = export(checkpoint, tmp_path / "shared", "--licence", "cc-by-4.0", "--data", "phantoms, public domain")
    assert "note" not in capsys.readouterr().out
    before, after = load_checkpoint(checkpoint), load_checkpoint(folder)
    assert same(before["network_weights"], after["network_weights"])
    for key in ("mim_config", "nnssl_adaptation_plan", "mim_version"):
        assert after[key] == json.loads(json.dumps(before[key]))
    for_finetuning, shared = PretrainedCheckpoint.load(checkpoint), PretrainedCheckpoint.load(folder)
    assert same(for_finetuning.encoder, shared.encoder)
    assert (shared.network, shared.preset, shared.view_size) == (NETWORK, "tiny", (32, 32, 32))
    assert shared.path == str(folder)
    plans = {"dataset_name": "D", "plans_name": "P", "pretrain_info": {"checkpoint_path": str(folder)}}
    assert find_checkpoint(plans, "3d_fullres", 0, tmp_path) == folder
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, CARD}
    assert not list(tmp_path.glob(".shared*"))


def test_names_are_left_out_but_seen_voxels_are_still_recognised(checkpoint, tmp_path):
    folder = export(checkpoint, tmp_path / "shared")
    assert b"Mustermann" not in b"".join(path.read_bytes() for path in folder.iterdir())
    provenance = PretrainedCheckpoint.load(folder).provenance
    units = Units.of(provenance), (2.0, 2.0, 2.0)
    assert leaked_cases(provenance, "Dataset001_Other", ["renamed"], lambda _: VOXELS, *units).same == ("renamed",)
    assert not leaked_cases(provenance, "Dataset900_Tiny", ["other"], lambda _: VOXELS + 1, *units)
    assert provenance_of(folder) == provenance, "experiments look for seen cases in it too"
    named = export(checkpoint, tmp_path / "named", "--with_names")
    assert PretrainedCheckpoint.load(named).provenance["cases"][0]["case"] == "Mustermann_1950"


def test_experiments_tell_folders_apart_by_their_weights(checkpoint, tmp_path):
    folders = [export(checkpoint, tmp_path / name) for name in ("one", "two")]
    stored = load_checkpoint(checkpoint)
    stored["network_weights"]["encoder.vit_blocks.0.attn.qkv.weight"] += 1
    save_atomically(stored, checkpoint)
    folders.append(export(checkpoint, tmp_path / "other"))
    hashes = [checkpoint_sha256(folder) for folder in folders]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_card_says_what_is_known(checkpoint, tmp_path, capsys):
    card = (export(checkpoint, tmp_path / "a", "--licence", "cc-by-4.0", "--data", "phantoms") / CARD).read_text()
    assert "license: cc-by-4.0" in card
    assert "- Data: phantoms; 1 cases of 1 dataset(s), resampled to 3 x 2.5 x 4 mm (the plans' order of axes)" in card
    assert "| reconstruction loss, level1 | 1.000 | 0.968 | 0.412 |" in card
    assert "Dice 0.200 before training, 0.350 now" in card
    assert "arXiv:2404.15580" in card
    capsys.readouterr()
    bare = (export(checkpoint, tmp_path / "b") / CARD).read_text()
    assert "license:" not in bare
    assert "Licence of the weights: not stated" in bare
    assert capsys.readouterr().out.count("is not given; the card says so") == 2


def test_nothing_is_overwritten(checkpoint, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    assert main([str(checkpoint), "-o", str(tmp_path / "mine")]) == 2
    assert "mine exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["x"]


@pytest.mark.parametrize("damage", ["bit", "short", "config"])
def test_damage_is_noticed(checkpoint, tmp_path, damage):
    folder = export(checkpoint, tmp_path / "shared")
    path = folder / (CONFIG if damage == "config" else WEIGHTS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if damage != "bit" else content)
    for read in (PretrainedCheckpoint.load, load_checkpoint):
        with pytest.raises(MiMError, match="no readable export"):
            read(folder)


def test_what_is_neither_file_nor_folder_nor_repository(tmp_path, monkeypatch):
    with pytest.raises(MiMError, match=r"holds no model\.safetensors"):
        locate(tmp_path)
    with pytest.raises(MiMError, match="does not exist"):
        locate(tmp_path / "no.pth")
    with pytest.raises(MiMError, match="does not exist"):
        locate("results/no.pth")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MiMError, match=r"huggingface_hub is missing: pip install 'nnunet_mim\[share\]'"):
        locate("somebody/encoder")


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of huggingface.co to fetch one repository."""

    folder = None
    asked: list[str]

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)

    def answer(self, with_body):
        path = self.path.split("?")[0]
        self.asked.append(path)
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/api/models/somebody/encoder/revision"):
            files = [{"rfilename": path.name} for path in sorted(self.folder.iterdir())]
            body = json.dumps({"id": "somebody/encoder", "sha": "a" * 40, "siblings": files}).encode()
        elif path.startswith("/api/models/somebody/encoder/tree"):
            files = [(path.name, path.stat().st_size) for path in sorted(self.folder.iterdir())]
            body = json.dumps(
                [{"type": "file", "oid": "b" * 40, "size": n, "path": name} for name, n in files]
            ).encode()
        elif path.startswith("/somebody/encoder/resolve/") and (self.folder / name).is_file():
            body = (self.folder / name).read_bytes()
        else:
            self.send_response(404)
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{name}-etag"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_repository_is_downloaded(checkpoint, tmp_path):
    """The real huggingface_hub, against a server on this machine."""
    folder = export(checkpoint, tmp_path / "shared")
    handler = type("OneRepository", (Hub,), {"folder": folder, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = (
        "import sys\nfrom nnunet_mim.errors import MiMError\n"
        "from nnunet_mim.checkpoint.format import PretrainedCheckpoint\n"
        "try: print(PretrainedCheckpoint.load(sys.argv[1]).preset)\n"
        "except MiMError as error: print(error)"
    )
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def said(name):
        done = subprocess.run(
            [sys.executable, "-c", program, name], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.strip().splitlines()[-1]

    try:
        assert said("somebody/encoder") == "tiny", handler.asked
        assert any(path.endswith(WEIGHTS) for path in handler.asked)
        assert "nobody/nothing is no file here and cannot be downloaded" in said("nobody/nothing")
    finally:
        server.shutdown()
