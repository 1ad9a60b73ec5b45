"""Pages of the documentation site that are made from other files: a hook of MkDocs (mkdocs.yml).

README, CONTRIBUTING, CHANGELOG, notebooks and the files of benchmarks/results become pages, the commands' help and the
Python functions a reference. Links between them, which are those of the checkout, follow.
"""

import posixpath
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FIGURES = "benchmarks/results"
LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?(\))")
COMMANDS = {
    "mim_prepare": "preparation.prepare_cli", "mim_plan": "preparation.cli", "mim_pretrain": "pretraining.cli",
    "mim_inspect": "inspection.cli", "mim_export": "inspection.export_cli", "mim_convert": "inspection.convert_cli",
    "mim_classify": "classification.cli", "mim_benchmark": "benchmarking.cli", "mim_demo": "demo.cli",
}  # fmt: skip
SUBCOMMANDS = {
    "mim_classify": ("train", "report", "predict", "export"),
    "mim_benchmark": ("prepare", "run", "few_shot"),
}
API = """\
# Python

[How to use these](../python.md).

::: nnunet_mim.api.load_encoder

::: nnunet_mim.api.features

::: nnunet_mim.api.Encoder
    options:
      members: [forward_features, forward, prepare, spacing]

::: nnunet_mim.api.pretrain

::: nnunet_mim.api.classify

::: nnunet_mim.api.report
"""


def on_files(files, config):
    """Add the pages that do not lie in docs/."""
    for source, page in places().items():
        path = ROOT / source
        if path.suffix == ".ipynb":
            for name, content in notebook_files(path, page).items():
                files.append(File.generated(config, name, content=content))
        elif not source.startswith("docs/") and path.suffix == ".md":
            files.append(File.generated(config, page, content=path.read_text(encoding="utf-8")))
        elif not source.startswith("docs/"):
            files.append(File.generated(config, page, abs_src_path=str(path)))
    files.append(File.generated(config, "reference/api.md", content=API))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links of the checkout into links of the site; what is no page of it becomes its name."""
    source_of = {page: source for source, page in places().items()}
    here = source_of.get(page.file.src_uri)
    if here is None:
        return markdown

    def moved(match):
        before, target, anchor, after = match.groups()
        source = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if source not in places():
            return match.group(0)
        relative = posixpath.relpath(places()[source], posixpath.dirname(page.file.src_uri) or ".")
        return f"{before}{relative}{anchor or ''}{after}"

    return LINK.sub(moved, markdown)


def places():
    """Page of every file that has one, both relative to their roots."""
    docs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*") if path.is_file()}
    figures = {path.name for path in (ROOT / FIGURES).iterdir()}
    others = {"LICENSE": "LICENSE.txt", "CITATION.cff": "CITATION.cff"}
    return {
        **{name: name.removeprefix("docs/").replace(".ipynb", ".md") for name in docs},
        **{f"{FIGURES}/{name}": f"figures/{name}" for name in figures},
        **PAGES,
        **others,
    }


def notebook_files(path, page):
    """The page of a notebook and its pictures: contents by their places on the site."""
    text, resources = MarkdownExporter().from_filename(str(path))
    pictures = {posixpath.join(posixpath.dirname(page), name): data for name, data in resources["outputs"].items()}
    return {page: text, **pictures}


def commands_page():
    """The help of every command."""
    parts = ["# Commands", ""]
    for name, module in COMMANDS.items():
        parts += [f"## {name}", "", *_help(name, module)]
        for subcommand in SUBCOMMANDS.get(name, ()):
            parts += [f"### {name} {subcommand}", "", *_help(name, module, subcommand)]
    return "\n".join(parts)


def _help(name, module, *subcommand):
    done = subprocess.run(
        [sys.executable, "-m", f"nnunet_mim.{module}", *subcommand, "--help"],
        capture_output=True, encoding="utf-8", check=True, cwd=ROOT,
    )  # fmt: skip
    text = re.sub(r";\s+here \d+\)", ")", done.stdout)  # cores of the machine that makes the page
    return ["```text", text.strip(), "```", ""]
