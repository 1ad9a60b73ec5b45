#!/usr/bin/env bash
# A release: checks the tree, builds, tries the wheel in a fresh environment, and says how to upload.
#
#   bash packaging/release.sh 0.2.0
#
# Before: the version stands in nnunet_mim/__init__.py and as a dated section of CHANGELOG.md, and CI has passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${1:?which version, such as 0.2.0}

fail() { echo "error: $1" >&2; exit 2; }
[ -z "$(git status --porcelain)" ] || fail "the tree has changes: commit them first"
grep -q "__version__ = \"$version\"" nnunet_mim/__init__.py || fail "nnunet_mim/__init__.py has another version"
grep -q "^## \[$version\] - [0-9]" CHANGELOG.md || fail "CHANGELOG.md has no dated section [$version]"

rm -rf build dist
python -m build
python -m pip show -q twine 2>/dev/null || python -m pip install -q twine
python -m twine check --strict dist/*

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
python -m venv "$fresh/venv"
"$fresh/venv/bin/pip" install -q dist/*.whl
(cd "$fresh" && venv/bin/mim_inspect --list_weights && venv/bin/mim_demo --quick -o demo)

# the notes of the release are its section of the changelog
awk -v begin="## [$version]" 'index($0, begin) == 1 {on = 1; next} /^## \[/ {on = 0} on' CHANGELOG.md > dist/NOTES.md
echo "built and tried. To publish:"
echo "  git tag -a v$version -F dist/NOTES.md && git push origin v$version"
echo "  python -m twine upload dist/*.whl dist/*.tar.gz"
