"""The documentation site: it is built without a warning, so every link and anchor in it leads somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_mim.config import PRESETS

ROOT = Path(__file__).parents[2]

pytest.importorskip("mkdocs")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", folder],  # -q would drop the warnings uncounted
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_readme_is_the_first_page(site):
    start = (site / "index.html").read_text()
    assert "The shortest way" in start
    assert 'href="data/"' in start, "links of the checkout are those of the site"
    assert "docs/data.md" not in start
    assert (site / "img" / "views.png").is_file()


def test_commands_and_functions_are_there(site):
    commands = (site / "reference" / "commands" / "index.html").read_text()
    for name in ("mim_prepare", "mim_pretrain", "mim_classify train", "mim_benchmark few_shot", "mim_demo"):
        assert f">{name}<" in commands, name
    assert all(preset in commands for preset in PRESETS)
    assert "or the number of cores" in commands
    assert "; here" not in commands, "the cores of the machine that made the page"
    functions = (site / "reference" / "api" / "index.html").read_text()
    for name in ("load_encoder", "features", "forward_features", "pretrain", "classify", "report"):
        assert re.search(rf'id="nnunet_mim\.api\.([a-zA-Z]+\.)*{name}"', functions), name


def test_figures_of_results_are_pages(site):
    results = (site / "results" / "index.html").read_text()
    linked = re.findall(r'href="\.\./figures/([^"/#]+)', results)
    assert len(linked) > 5
    assert all((site / "figures" / name).exists() for name in linked)


def test_the_notebook_is_a_page_with_its_picture(site):
    page = (site / "notebooks" / "quickstart" / "index.html").read_text()
    assert "nearest fine scan: [0, 1, 2, 3]" in page
    assert 'href="../../classification/"' in page, "links of the notebook are those of the site"
    (picture,) = re.findall(r'src="\.\./([^"]+\.png)"', page)
    assert (site / "notebooks" / picture).stat().st_size > 1000
    assert 'href="../notebooks/quickstart/"' in (site / "python" / "index.html").read_text()
