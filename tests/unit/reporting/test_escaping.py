"""Names in files are shown as they are on pages, in Markdown, YAML and pictures and on a terminal, and do nothing."""

from __future__ import annotations

import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.checkpoint.format import build_checkpoint, save_atomically
from nnunet_mim.checkpoint.locate import CARD
from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.inspection.cli import main as mim_inspect
from nnunet_mim.inspection.export_cli import main as mim_export
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.reporting.figures import Slices, gallery_figure
from nnunet_mim.reporting.page import Section, figure_png, markdown_text, write_page

HOSTILE = "Dataset900_<script>alert(1)</script>|\n---\n\x1b[2J$(touch x)`x`; touch y #![a](http://b)"
NETWORK = NetworkConfig((6, 6, 6, 12), (1, 1, 1, 1), 2, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2)


class Tags(HTMLParser):
    """Collects the tags of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint in which every text is hostile that can be: a fold is a number or all."""
    torch.manual_seed(0)
    config = PretrainConfig(preset="tiny", network=NETWORK, view_size=(32, 32, 32), init_checkpoint=HOSTILE)
    window = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0}
    provenance = {
        "datasets": [HOSTILE], "plans_name": HOSTILE, "configuration": HOSTILE, "fold": "all",
        "spacing": [3.0, 3.0, 3.0], "normalization": [HOSTILE], "intensity_properties": {"0": window},
        "iterations": 10, "loss_history": [], "converted_from": HOSTILE, "note": HOSTILE,
        "cases": [{"dataset": HOSTILE, "case": HOSTILE, "sha256": "0"}],
    }  # fmt: skip
    path = tmp_path / "checkpoint_final.pth"
    save_atomically(build_checkpoint(MaskInMask(NETWORK, 1).state_dict(), config, provenance), path)
    return path


def test_a_terminal(checkpoint, capsys):
    assert mim_inspect([str(checkpoint)]) == 0
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.split("\n"))
    assert r"\x1b[2J" in text
    commands = [line.strip() for line in text.split("to finetune from it\n")[1].splitlines() if "nnUNetv2" in line]
    for command in commands:
        words = list(shlex.shlex(command, posix=True, punctuation_chars=";&|<>()"))
        assert not {";", "|", "&", "<", ">"} & set(words), "the shell runs one command"


def test_an_error_on_a_terminal(tmp_path, capsys):
    assert mim_inspect([str(tmp_path / "no\x1b[2J\nthing.pth")]) == 2
    assert capsys.readouterr().err.rstrip("\n").isprintable()


def test_a_model_card(checkpoint, tmp_path):
    licence = "cc-by-4.0\n---\n# not the end"
    folder = tmp_path / "shared"
    assert mim_export([str(checkpoint), "-o", str(folder), "--licence", licence, "--data", HOSTILE]) == 0
    card = (folder / CARD).read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == licence
    assert list(yaml.safe_load(front)) == ["library_name", "license", "tags"]
    assert text.startswith("\n# MiM-pretrained encoder (tiny)\n")
    assert "\n---" not in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# MiM-pretrained encoder (tiny)", "## Measured on held-out cases", "## Use", "## Cite",
    ]  # fmt: skip
    assert not Tags(text).tags
    assert "](" not in text


@pytest.mark.parametrize("licence", ["cc-by-4.0", "apache-2.0", "yes", "1.0", "- a", "a: b", "null"])
def test_a_licence_is_a_text(checkpoint, tmp_path, licence):
    folder = tmp_path / "shared"
    assert mim_export([str(checkpoint), "-o", str(folder), "--licence", licence]) == 0
    front = (folder / CARD).read_text().split("---\n")[1]
    assert yaml.safe_load(front)["license"] == licence


def test_a_page_of_mim_inspect(checkpoint, tmp_path):
    assert mim_inspect([str(checkpoint), "-o", str(tmp_path / "looks")]) == 0
    page = Tags((tmp_path / "looks" / "report.html").read_text())
    assert not {"script", "a"} & {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script>" in page.text


def test_every_part_of_a_page(tmp_path):
    figure = gallery_figure([Slices(HOSTILE, np.zeros((8, 8)), np.zeros((8, 8)), (1.0, 1.0, 1.0))])
    figures, table = [figure, figure_png(figure)], [[HOSTILE, "a"], [HOSTILE, "b"]]
    section = Section(HOSTILE, HOSTILE, HOSTILE, figures, table, HOSTILE)
    write_page(tmp_path / "a.html", HOSTILE, [section], HOSTILE)
    page = Tags((tmp_path / "a.html").read_text())
    allowed = {"html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "p", "div", "table", "tr", "th",
               "td", "figure", "img", "pre"}  # fmt: skip
    assert {tag for tag, _ in page.tags} <= allowed
    assert all(set(attributes) <= {"alt", "src"} for tag, attributes in page.tags if tag == "img")
    assert page.text.count("<script>alert(1)</script>") == 9


@pytest.mark.parametrize("name", ["$\\bad{", "$x$", "a$b", "$$"])
def test_dollar_signs_in_pictures_are_dollar_signs(name):
    figure = gallery_figure([Slices(name, np.zeros((8, 8)), np.zeros((8, 8)), (1.0, 1.0, 1.0))])
    assert figure_png(figure).startswith(b"\x89PNG")


@given(st.text())
def test_markdown_is_one_line_without_tags_columns_and_links(text):
    shown = markdown_text(text)
    assert shown.isprintable()
    assert "|" not in shown
    assert "](" not in shown
    assert not Tags(f"{shown}\n").tags


def test_numbers_and_intervals_in_markdown_stay_as_they_are():
    for text in ("< 0.001", "[1.0, 5.8]", "60.00 ± 7.07", "Dice % of liver_tumour"):
        assert markdown_text(text) == text
