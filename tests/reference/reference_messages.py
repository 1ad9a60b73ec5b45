"""What the package's source says to users: its texts as far as they can be put together, and the commands that print
them. Nothing is run; what only a run knows stands as ⟨x⟩.
"""

import argparse
import ast
import functools
import itertools
import re
from pathlib import Path

COMMAND = re.compile(r"\b(mim_[a-z]+|nnUNetv2_\w+)(?![\w/.-])")
FLAG = re.compile(r"(?<![\w/.<=⟩-])--?[A-Za-z][\w-]*")
VALUE = re.compile(r"⟨|[A-Z0-9…'\"]|.*[_=/.\d]")
"""beginning of what can only be a value: a placeholder, capitals, a number; or a word with signs in it"""
EXITING = {"-h", "--help", "--list_settings", "--list_weights"}
UNKNOWN = "⟨x⟩"
MOST = 64
"""texts that one message is spelt out to; of more, every part is in at least one"""
AS_GIVEN = {"printable", "printable_lines", "quote", "str"}
"""functions whose text is that of their first argument"""


def words_after(text):
    """The words of a command line in a sentence: flags, and values as far as they can be told from prose."""
    words: list[str] = []
    for word in text.split():
        if word.startswith("("):
            break
        bare = word.strip("`'\"()[],;:").rstrip(".")
        ends = word.rstrip("'\"") != word.rstrip("'\"`),;:.") or not bare
        is_flag = re.fullmatch(r"--?[A-Za-z][\w-]*", bare) is not None
        if not is_flag and not (words and words[-1].startswith("-")) and not VALUE.match(bare):
            break
        words.append(bare)
        if ends:
            break
    return words


def commands_in(text):
    """(name, words after it) of every command in a text. The name of a subcommand is the first word."""
    for match in COMMAND.finditer(text):
        rest = text[match.end() :].split("\n")[0]
        subcommand = re.match(r" (train|report|predict|export|run|few_shot|prepare)\b(?=[ `]*(.*))", rest)
        if subcommand and match.group(1) in ("mim_benchmark", "mim_classify"):
            yield match.group(1), [subcommand.group(1), *words_after(subcommand.group(2))]
        else:
            yield match.group(1), words_after(rest) if rest[:1] == " " else []


def problem(parser, words):
    """What is wrong with a command line, or None. Without any flag or value it is only the name of a command."""
    subcommands = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    if subcommands is not None:
        parser = subcommands.choices.get(words[0]) if words else parser
        if parser is None:
            return f"no subcommand {words[0]}"
        words = words[1:]
    if not words:
        return None
    flags = [word for word in words if word.startswith("-") and not word[1:2].isdigit()]
    if unknown := [flag for flag in flags if flag not in parser._option_string_actions]:
        return f"does not take {unknown[0]}"
    if EXITING.intersection(flags):
        return None
    given = {parser._option_string_actions[flag].dest for flag in flags}
    optional = [a for a in parser._actions if a.option_strings]
    if missing := [a.option_strings[0] for a in optional if a.required and a.dest not in given]:
        return f"lacks {missing[0]}"
    positional = [a for a in parser._actions if not a.option_strings and a.nargs not in ("*", "?")]
    values = []
    for before, word in zip(["", *words], words, strict=False):
        action = parser._option_string_actions.get(before)
        if not word.startswith("-") and (action is None or action.nargs == 0):
            values.append(word)
    return f"lacks {positional[len(values)].dest}" if len(values) < len(positional) else None


class Package:
    """The modules of a package, and what stands in them."""

    def __init__(self, root, name):
        self.trees = {}
        for path in sorted(Path(root, name).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            self.trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
        self.defined = {module: _top_level(tree) for module, tree in self.trees.items()}
        self.imported = {module: _imports(tree) for module, tree in self.trees.items()}
        self.properties = {}
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and any(_name(d) == "property" for d in node.decorator_list):
                    self.properties.setdefault(node.name, []).append((module, node))
        self.between = "\n"
        """what stands between the words of a list that is part of the text being put together"""
        self.used = set()
        """nodes whose text is part of another one"""

    def find(self, module, name):
        """(module, name) of what a name in a module stands for, or None."""
        for _ in range(5):
            if name in self.defined.get(module, {}):
                return module, name
            module, name = self.imported.get(module, {}).get(name, (None, None))
        return None

    def reached_from(self, *places):
        """All (module, name) whose definitions the definitions at these places name, and so on; parsers left out."""
        todo, found = list(places), set()
        while todo:
            place = todo.pop()
            if place in found or _makes_parser(self.defined[place[0]][place[1]]):
                continue
            found.add(place)
            for node in ast.walk(self.defined[place[0]][place[1]]):
                target = None
                if isinstance(node, ast.Name):
                    target = self.find(place[0], node.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    base = self.imported[place[0]].get(node.value.id)
                    target = self.find(".".join(base), node.attr) if base and base[1] else None
                if target is not None:
                    todo.append(target)
        return found

    def messages(self):
        """(module, name of the definition, line, texts) of every string that is no docstring and no part of another."""
        found = []
        for module, definitions in self.defined.items():
            for name, definition in definitions.items():
                for node, function in _strings(definition):
                    found.append((module, name, node, self.texts(node, module, function)))
        return [(m, name, node.lineno, texts) for m, name, node, texts in found if node not in self.used]

    def texts(self, node, module, function, bound=None, depth=0):
        """The texts that an expression may have: as it is written, with what fills it in as far as that is known.

        `function` is the one around it, `bound` has the texts of its arguments.
        """
        if depth > 12:
            return [UNKNOWN]

        def of(part):
            found = self.texts(part, module, function, bound, depth + 1)
            self.used.add(part)
            return found

        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else [UNKNOWN]
        if isinstance(node, ast.JoinedStr):
            return _product([of(part) for part in node.values])
        if isinstance(node, ast.FormattedValue):
            return of(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return _product([of(node.left), of(node.right)])
        if isinstance(node, ast.List | ast.Tuple):
            return _product([text for part in node.elts for text in (of(part), [self.between])][:-1])
        if isinstance(node, ast.IfExp):
            return _unique(of(node.body) + of(node.orelse))
        if isinstance(node, ast.BoolOp):
            return _unique([text for value in node.values for text in of(value)])
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            place = self.find(module, node.value.id)
            content = self.defined[place[0]][place[1]] if place else None
            content = getattr(content, "value", None)
            return _unique([t for v in content.values for t in of(v)]) if isinstance(content, ast.Dict) else [UNKNOWN]
        if isinstance(node, ast.Name):
            return self._of_name(node.id, module, function, bound or {}, of, depth)
        if isinstance(node, ast.Attribute) and len(self.properties.get(node.attr, [])) == 1:
            place, made = self.properties[node.attr][0]
            return self._returned(made, place, {}, depth)
        if isinstance(node, ast.Call):
            return self._of_call(node, module, of, depth)
        return [UNKNOWN]

    def _of_name(self, name, module, function, bound, of, depth):
        if name in bound:
            return bound[name]
        assigned = _assigned(function).get(name, []) if function is not None else []
        texts = [text for value, added in assigned if not added for text in of(value)]
        for value, added in assigned:
            texts += _product([list(texts) or [UNKNOWN], of(value)]) if added else []
        if not assigned and (place := self.find(module, name)) is not None:
            content = self.defined[place[0]][place[1]]
            if isinstance(content, ast.Assign | ast.AnnAssign) and content.value is not None:
                texts = self.texts(content.value, place[0], None, None, depth + 1)
                self.used.add(content.value)
        return _unique(texts)[: 4 * MOST] or [UNKNOWN]

    def _of_call(self, node, module, of, depth):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else _name(node.func)
        if called in AS_GIVEN and node.args:
            return of(node.args[0])
        if called in ("join", "format", "split") and isinstance(node.func, ast.Attribute):
            if called == "format":
                return [re.sub(r"\{.*?\}", UNKNOWN, text) for text in of(node.func.value)]
            if called == "split":
                return of(node.func.value)
            by = [" "] if _name(node.func.value) == "shlex" else of(node.func.value)
            before, self.between = self.between, by[0]
            parts = [of(part) for part in _elements(node.args[0])] if node.args else []
            self.between = before
            joined = list(itertools.chain.from_iterable((part, by) for part in parts))[:-1]
            return _product(joined) if joined else [UNKNOWN]
        place = self.find(module, called) if isinstance(node.func, ast.Name) else None
        made = self.defined[place[0]][place[1]] if place else None
        if not isinstance(made, ast.FunctionDef):
            return [UNKNOWN]
        names = [argument.arg for argument in made.args.args + made.args.kwonlyargs]
        given = dict(zip(names, node.args, strict=False)) | {k.arg: k.value for k in node.keywords if k.arg}
        defaults = dict(zip(reversed(made.args.args), reversed(made.args.defaults), strict=False))
        for argument, default in defaults.items():
            given.setdefault(argument.arg, default)
        return self._returned(made, place[0], {name: of(value) for name, value in given.items()}, depth)

    def _returned(self, function, module, bound, depth):
        texts = []
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and node.value is not None:
                texts += self.texts(node.value, module, function, bound, depth + 1)
                self.used.add(node.value)
        return _unique(texts)[: 4 * MOST] or [UNKNOWN]


def _product(parts):
    """All ways to join one text of every part; of too many, so many that each is in one."""
    number = 1
    for part in parts:
        number *= len(part)
    if number > MOST:
        longest = max(map(len, parts))
        return _unique(["".join(part[i % len(part)] for part in parts) for i in range(longest)])
    return _unique(["".join(texts) for texts in itertools.product(*parts)])


def _unique(texts):
    return list(dict.fromkeys(texts))


def _elements(node):
    """The expressions of a list or tuple that is written out; of a comprehension its one; else the node itself."""
    if isinstance(node, ast.Starred):
        return _elements(node.value)
    if isinstance(node, ast.List | ast.Tuple):
        return [part for element in node.elts for part in _elements(element)]
    return [node.elt] if isinstance(node, ast.ListComp | ast.GeneratorExp) else [node]


def _name(node):
    return node.id if isinstance(node, ast.Name) else None


def _top_level(tree):
    """The definitions of a module by name: functions, classes, and the statements that give names values."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        found[name.id] = node
    return found


def _imports(tree):
    """{name: (module, name there)} of every import, also of those inside functions."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
    return found


@functools.cache
def _assigned(function):
    """{name: [(expression, whether it is added)]} of the names that a function gives values."""
    found = {}
    for node in ast.walk(function):
        pairs = []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs += zip(target.elts, node.value.elts, strict=False)
                else:
                    pairs.append((target, node.value))
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            pairs.append((node.target, node.value))
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
            found.setdefault(_name(node.target), []).append((node.value, True))
        for target, value in pairs:
            found.setdefault(_name(target), []).append((value, False))
    return found


def _strings(definition):
    """(node, function around it) of every text that is written in a definition, the longest ones only.

    Left out are docstrings and what a field says of itself, which is in the help.
    """

    def walk(node, function):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        if isinstance(node, ast.Call) and _name(node.func) in ("setting", "Setting"):
            return
        if isinstance(node, ast.FunctionDef):
            function = node
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        is_sum = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
        is_join = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("join", "format")
        if is_text or is_sum or is_join or isinstance(node, ast.JoinedStr):
            yield node, function
        if isinstance(node, ast.List) and node.elts:
            words = [part for element in node.elts for part in _elements(element)]
            line = ast.Call(ast.Attribute(ast.Constant(" "), "join"), [ast.List(words)], [], lineno=node.lineno)
            if words and isinstance(words[0], ast.Constant) and COMMAND.fullmatch(str(words[0].value)):
                yield line, function
        if isinstance(node, ast.JoinedStr):
            for part in node.values:
                if isinstance(part, ast.FormattedValue):
                    yield from walk(part.value, function)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, function)

    yield from walk(definition, None)


def _makes_parser(definition):
    """Whether a function adds flags to a parser: its texts are the help, which the parser itself can be asked for."""
    called = {getattr(n.func, "attr", _name(n.func)) for n in ast.walk(definition) if isinstance(n, ast.Call)}
    return isinstance(definition, ast.FunctionDef) and bool(called & {"add_argument", "add_flags", "add_parser"})
