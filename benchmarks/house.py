"""Count what makes a code base hard to read: lines, public names, long functions, long parameter lists.

python benchmarks/house.py [--json] [ROOT]     ROOT: a checkout, by default this one
"""

import argparse
import ast
import json
import re
from collections import Counter
from pathlib import Path

LONG, MANY = 60, 8
LOADERS = re.compile(r"\b(torch\.load|load_file|safe_open)\(|from safetensors\.torch import load\b")
PARSED = re.compile(r"""split\("/"\)|endswith\("/|startswith\("(val|train|baseline)/|f"(val|train|baseline)/""")


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Number of parameters without self and cls."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def count(root: Path) -> dict:
    """Figures of the package in a checkout; functions and classes count as names, constants do not."""
    package = root / "nnunet_mim"
    lines, names, long_functions, many_parameters = Counter(), Counter(), [], []
    loads, parses = [], []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package)
        room = file.parts[0] if len(file.parts) > 1 else "root"
        text = path.read_text()
        lines[room] += len(text.splitlines())
        tree = ast.parse(text)
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        names[room] += sum(isinstance(n, definitions) and not n.name.startswith("_") for n in tree.body)
        loads += [str(file)] * bool(LOADERS.search(text))
        parses += [str(file)] * len(PARSED.findall(text))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > LONG:
                    long_functions.append((length, f"{file}:{node.name}"))
                if parameters(node) > MANY:
                    many_parameters.append((parameters(node), f"{file}:{node.name}"))
    return {
        "lines": sum(lines.values()),
        "lines_of_rooms": dict(lines),
        "public_names": sum(names.values()),
        "public_names_of_rooms": dict(names),
        "root_modules": len(list(package.glob("*.py"))),
        "functions_above_60_lines": sorted(long_functions, reverse=True),
        "functions_above_8_parameters": sorted(many_parameters, reverse=True),
        "files_that_load_weights": loads,
        "places_that_parse_or_make_a_name_of_a_figure": dict(Counter(parses)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = count(options.root)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
