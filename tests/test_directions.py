"""Imports go one way, and functions, files and docstrings keep to the limits of CONTRIBUTING.md."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up: a file imports from lower levels, and from the members of its own group. Names on one line are of
# one level; these do not import each other.
LEVELS = [
    ["remote", "minivlm.cli", "minivlm.resources"],
    ["minivlm.pages", "minivlm.terminal", "minivlm.json_schema", "minivlm.decoding"],
    ["minivlm.data", "minivlm.model", "minivlm.hub", "minivlm.constrained", "minivlm.tool_calls"],
    ["minivlm.inference", "minivlm.reading", "minivlm.onnx_engine"],
    ["minivlm.evaluation", "minivlm.training", "minivlm.convert", "minivlm.asking"],
    ["minivlm.app", "minivlm.server", "minivlm.benchmark"],
    ["train_accelerate"],
    ["minivlm.commands"],  # above train_accelerate, which `minivlm train` starts
    ["minivlm.__main__", "tools", "examples", "app"],
    ["tests"],
]
REMOTE = ["configuration_minivlm", "processing_minivlm", "modeling_minivlm"]
# From source to batch, each file imports only those before it; the previews stand beside this path.
DATA = """
    bad_rows control_tokens pictures files schemas options rows phrases encoder dataset composed plans collators
    streaming features loader preview preview_page
""".split()
LIMITS = {"function": 40, "parameters": 7, "file": 399, "modeling": 519}
BANNER = re.compile(r"#\s*([-=#*~_─═])\1{2,}|.*([-=#*~_─═])\2{3,}\s*$")
RIDDLES = re.compile(r"(What|Whether|How)\b")


def python_files(root):
    """Return the Python files of a repository: those at its root and in its folders of code."""
    folders = ("minivlm", "tools", "tests", "examples")
    inside = (path for folder in folders for path in sorted((root / folder).rglob("*.py")))
    return [*sorted(root.glob("*.py")), *inside]


def module_name(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree, known, package):
    """Yield (line, module) for every module of the repository that a file imports, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A relative import counts from the package; at the root, where the remote files are, from nothing.
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level and package else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}".strip(".") for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:  # `from minivlm.data.rows import Rows` names an object at the end
                name = name.rpartition(".")[0]
            if name:
                yield node.lineno, name


def place(module):
    """Return (level, group) of a module; None if no level has it."""
    if module in REMOTE:
        return 0, "remote"
    for level, groups in enumerate(LEVELS):
        for group in groups:
            if module == group or module.startswith(f"{group}."):
                return level, group
    return None


def reason(source, target):
    """Return the rule that an import of `target` in `source` breaks; None if it is allowed."""
    if target == "minivlm":  # its docstring; it imports nothing
        return None
    here, there = place(source), place(target)
    if there is None:
        return f"{target} has no level. Add it to LEVELS in tests/test_directions.py."
    if here[1] != there[1]:
        if there[0] > here[0]:
            return f"{there[1]} is above {here[1]}: imports go from above to below."
        if there[0] == here[0]:
            return f"{here[1]} and {there[1]} are on one level: neither imports the other."
        return None
    for prefix, order in (("", REMOTE), ("minivlm.data.", DATA)):
        names = [name.removeprefix(prefix) for name in (source, target)]
        if all(name in order for name in names) and order.index(names[1]) >= order.index(names[0]):
            return f"the order is {' < '.join(order)}."
    return None


def back_arrows(root):
    """Return a line for every import against the order: file, line, what it imports, the rule."""
    files = {module_name(path, root): path for path in python_files(root)}
    found = []
    for source, path in files.items():
        where = path.relative_to(root).as_posix()
        if source == "minivlm":
            here = (-1, "minivlm")
        elif (here := place(source)) is None:
            found.append(f"{where}: {source} has no level. Add it to LEVELS in tests/test_directions.py.")
            continue
        if source.startswith("minivlm.data.") and source.removeprefix("minivlm.data.") not in DATA:
            found.append(f"{where}: {source} has no place. Add it to DATA in tests/test_directions.py.")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = source if path.name == "__init__.py" else source.rpartition(".")[0]
        for line, target in imported(tree, files, package):
            if here[1] == "minivlm":
                found.append(f"{where}:{line}: imports {target}: minivlm/__init__.py imports nothing.")
            elif problem := reason(source, target):
                found.append(f"{where}:{line}: imports {target}: {problem}")
    return found


def relative_imports(root):
    """Return a line for every relative import outside of the remote files, whose loader needs them."""
    return [
        f"{path.relative_to(root).as_posix()}:{node.lineno}: a relative import. Write the absolute name."
        for path in python_files(root)
        if path.stem not in REMOTE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def is_forward(path, function):
    """Return whether a function is a forward of the model, which may be as long as the figure that it follows."""
    return path.name == "modeling_minivlm.py" and function.name == "forward"


def functions(root):
    """Yield (path, function) of the code that others read: not of tools and tests."""
    for path in python_files(root):
        if path.relative_to(root).parts[0] in ("tools", "tests"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_forward(path, node):
                yield path, node


def long_functions(root):
    """Return a line for every function that does not fit on a screen."""
    found = []
    for path, node in functions(root):
        if (lines := node.end_lineno - node.lineno + 1) > LIMITS["function"]:
            where = f"{path.relative_to(root).as_posix()}:{node.lineno}: {node.name}"
            found.append(f"{where} has {lines} lines, more than {LIMITS['function']}.")
    return found


def crowded_functions(root):
    """Return a line for every function with too many parameters; `self`, `*args` and `**kwargs` do not count."""
    found = []
    for path, node in functions(root):
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([a for i, a in enumerate(named) if i or a.arg not in ("self", "cls")])
        if count > LIMITS["parameters"]:
            where = f"{path.relative_to(root).as_posix()}:{node.lineno}: {node.name}"
            found.append(f"{where} has {count} parameters, more than {LIMITS['parameters']}.")
    return found


def long_files(root):
    """Return a line for every file that is too long."""
    found = []
    for path in python_files(root):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = LIMITS["modeling" if path.name == "modeling_minivlm.py" else "file"]
        if lines > limit:
            found.append(f"{path.relative_to(root).as_posix()}: {lines} lines, more than {limit}.")
    return found


def banners(root):
    """Return a line for every comment that draws a line."""
    found = []
    for path in python_files(root):
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.COMMENT and BANNER.match(token.string):
                    where = f"{path.relative_to(root).as_posix()}:{token.start[0]}"
                    found.append(f"{where}: a banner, {token.string!r}. Write a sentence, or a file of its own.")
    return found


def riddles(root):
    """Return a line for every docstring of the package and the root that is no sentence with a verb in front."""
    found = []
    for path in python_files(root):
        if path.relative_to(root).parts[0] in ("tools", "tests", "examples"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = ast.get_docstring(node) or ""
                where = f"{path.relative_to(root).as_posix()}:{getattr(node, 'lineno', 1)}"
                if RIDDLES.match(doc):
                    found.append(f"{where}: {doc.splitlines()[0]!r} begins with {doc.split()[0]}. Begin with a verb.")
                if doc.startswith("TODO"):
                    found.append(f"{where}: {doc.splitlines()[0]!r}. Say what the file is for.")
    return found


RULES = [back_arrows, relative_imports, long_functions, crowded_functions, long_files, banners, riddles]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule):
    found = rule(ROOT)
    assert not found, "\n" + "\n".join(found)


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


GOOD = {
    "configuration_minivlm.py": "",
    "modeling_minivlm.py": "try:\n    from .configuration_minivlm import A\nexcept ImportError:\n"
    "    from configuration_minivlm import A\n",
    "minivlm/__init__.py": '"""Nothing."""\n',
    "minivlm/__main__.py": "from minivlm.commands import train\n",
    "minivlm/cli.py": "import sys\n",
    "minivlm/data/__init__.py": "",
    "minivlm/data/files.py": "from minivlm.cli import UserError\n",
    "minivlm/data/rows.py": "from minivlm.data.files import READERS\n",
    "minivlm/model/__init__.py": "",
    "minivlm/model/loading.py": "import modeling_minivlm\n",
    "minivlm/inference.py": "from minivlm.model import loading\n",
    "minivlm/training/__init__.py": "",
    "minivlm/training/options.py": "from minivlm.data import rows\n",
    "minivlm/commands/__init__.py": "",
    "minivlm/commands/train.py": "import train_accelerate\n",
    "train_accelerate.py": "def main():\n    from minivlm.training.options import x\n",
    "tests/test_a.py": "import train_accelerate\nimport tests.test_b\n",
    "tests/test_b.py": "from minivlm.__main__ import main\n",
}
BAD_ARROWS = {
    "back": ("minivlm/model/loading.py", "\nfrom minivlm.training.options import x\n", 2, "minivlm.training is above"),
    "hidden": ("minivlm/data/rows.py", "def f():\n    import minivlm.inference\n", 2, "minivlm.inference is above"),
    "beside": ("minivlm/data/files.py", "from minivlm.model.loading import f\n", 1, "on one level"),
    "package": ("minivlm/data/files.py", "from minivlm import model\n", 1, "on one level"),
    "order": ("minivlm/data/files.py", "from minivlm.data import rows\n", 1, "the order is bad_rows <"),
    "trio": ("configuration_minivlm.py", "from .modeling_minivlm import B\n", 1, "the order is configuration_minivlm"),
    "remote": ("modeling_minivlm.py", "from minivlm.cli import UserError\n", 1, "on one level"),
    "script": ("minivlm/training/options.py", "import train_accelerate\n", 1, "train_accelerate is above"),
    "tests": ("train_accelerate.py", "from tests.test_a import x\n", 1, "tests is above"),
    "init": ("minivlm/__init__.py", "from minivlm.data import rows\n", 1, "imports nothing"),
}


def test_a_good_tree_passes(tmp_path):
    write(tmp_path, GOOD)
    assert [line for rule in RULES for line in rule(tmp_path)] == []


@pytest.mark.parametrize("name", BAD_ARROWS)
def test_an_arrow_back_is_found(name, tmp_path):
    file, text, line, rule = BAD_ARROWS[name]
    write(tmp_path, GOOD | {file: text})
    [found] = back_arrows(tmp_path)
    assert found.startswith(f"{file}:{line}: imports ") and rule in found


def test_a_file_without_a_place_is_found(tmp_path):
    write(tmp_path, GOOD | {"helper.py": "", "minivlm/data/more.py": "", "minivlm/other/x.py": ""})
    assert [line.split(":")[0] for line in back_arrows(tmp_path)] == [
        "helper.py", "minivlm/data/more.py", "minivlm/other/x.py"
    ]  # fmt: skip


def test_a_relative_import_is_found(tmp_path):
    write(tmp_path, GOOD | {"minivlm/data/rows.py": "from .files import READERS\nfrom ..model import loading\n"})
    assert [line.split(": ")[0] for line in relative_imports(tmp_path)] == [
        "minivlm/data/rows.py:1", "minivlm/data/rows.py:2"
    ]  # fmt: skip
    assert len(back_arrows(tmp_path)) == 1  # of data to model, whichever way it is spelt


def function(name, lines, parameters="x"):
    return f"def {name}({parameters}):\n" + "    pass\n" * (lines - 1)


def test_limits_of_functions_are_found(tmp_path):
    many, few = "a, b, c, d, *, e, f, g, h", "self, a, b, c, d, *, e, f, g, **kwargs"
    code = function("short", 40) + function("long", 41) + function("few", 2, few) + function("many", 2, many)
    write(tmp_path, {"minivlm/cli.py": code, "tools/x.py": code, "tests/x.py": code})
    write(tmp_path, {"modeling_minivlm.py": function("forward", 60, many) + function("other", 41)})
    assert [line.split(": ", 1)[1] for line in long_functions(tmp_path)] == [
        "other has 41 lines, more than 40.", "long has 41 lines, more than 40."
    ]  # fmt: skip
    assert [line.split(": ", 1)[1] for line in crowded_functions(tmp_path)] == ["many has 8 parameters, more than 7."]


def test_long_files_banners_and_riddles_are_found(tmp_path):
    write(tmp_path, {"minivlm/a.py": "x = 1\n" * 399, "minivlm/b.py": "x = 1\n" * 400})
    write(tmp_path, {"modeling_minivlm.py": "x = 1\n" * 519})
    assert [line.split(":")[0] for line in long_files(tmp_path)] == ["minivlm/b.py"]
    comments = "# ------ data ------\n# Data\nx = '# ----'  # a - b\n# data ====\n#####\n# https://a/b--c\n"
    write(tmp_path, {"minivlm/c.py": comments})
    assert [line.split(": ")[0] for line in banners(tmp_path)] == [f"minivlm/c.py:{n}" for n in (1, 4, 5)]
    docs = '"""How it is."""\ndef f():\n    """What it is."""\nclass A:\n    """Whatever is meant is fine."""\n'
    write(tmp_path, {"minivlm/d.py": docs, "minivlm/e.py": '"""TODO e."""\n', "tests/d.py": docs})
    assert [line.split(": ")[0] for line in riddles(tmp_path)] == [
        "minivlm/d.py:1", "minivlm/d.py:2", "minivlm/e.py:1"
    ]  # fmt: skip
