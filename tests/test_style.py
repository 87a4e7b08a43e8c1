"""The house style, over every script on disk: layout, flags, names, purity of the maths, quiet imports.

Each check takes a path and returns a list of problems; the second half of the file breaks every rule once, on
purpose.
"""

import ast
import importlib.util
import os
import random
import re
import subprocess
import sys
import threading

import pytest
from sync_copies import ROOT, RULE, SECTIONS, scripts, section_of, sections
from sync_docs import class_args, flags

SCRIPTS = scripts()
MODULES = sorted(ROOT.glob("*.py"))
COMMON = [path for path in MODULES if path.name == "common.py"]
WIDTH = 110

# Flags whose help and type may differ between scripts, because the method gives the name its meaning:
# beta is the weight of the KL in the loss, DPO's inverse temperature, IPO's tau, ORPO's lambda (None: by
# method); loss, loss_agg and algorithm choose among what a script has; label_smoothing has a default by loss
# in dpo.py; a process reward model has one verifier, an online script several rewards; CISPO has another
# upper clip than its siblings; of rloo_remax.py's estimators only one discounts.
METHOD_FLAGS = {"beta", "loss", "loss_agg", "algorithm", "label_smoothing", "reward", "epsilon_high", "gamma"}

# Names with another name in this house, or with none that says what they hold.
UNUSED_NAMES = re.compile(r"(loss|tmp|temp)\d+|tmp|data|mask")
OTHERS_NAMES = {"per_token_logps", "response_ids", "action_mask", "cliprange", "clip_coef"}

# The third section is named by what the script does: merge.py trains nothing.
WORK = ("Training", "Merging")

# What a function of the Algorithm section does not know of.
IMPURE = re.compile(r"args|print|open|(logging|logger|wandb|tqdm|dist|torch\.(cuda|distributed))(\..*)?")

# Calls that compute a constant and touch nothing else.
CONSTANT_CALLS = {
    "re.compile",
    "frozenset",
    "set",
    "dict",
    "tuple",
    "range",
    "float",
    "int",
    "partial",
    "TypeVar",
}
CONSTANT_CALLS |= {"math.log", "math.sqrt", "torch.finfo", "functools.partial", "Path", "namedtuple"}
CONSTANT_CALLS |= {"np.array", "np.zeros", "np.ones", "np.arange"}


def parse(path):
    return ast.parse(path.read_text())


def dotted(node):
    """`a.b.c` of a chain of attributes, "" of anything else."""
    text = ast.unparse(node)
    return text if re.fullmatch(r"[\w.]+", text) else ""


def is_main_block(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def top_functions(path, section=None):
    source = path.read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if section is None or section_of(source, node.lineno - 1) == section:
                yield node


# Layout -----------------------------------------------------------------------------------------------------


def layout(path):
    source = path.read_text()
    tree, found = ast.parse(source), sections(source)
    titles = [title for title, _ in found]
    work = titles[2] if len(titles) > 2 and titles[2] in WORK else SECTIONS[2]
    wanted = [*SECTIONS[:2], work, SECTIONS[3]]
    problems = [] if titles == wanted else [f"sections are {titles}, not {wanted}"]
    rules = [line for line in source.splitlines() if re.match(r"#\s*[-=*#]{20,}", line)]
    if rules != [RULE] * 2 * len(found):
        problems.append("a rule line that is not part of a section banner, or not the house's")
    if not ast.get_docstring(tree):
        problems.append("no module docstring")
    for node in tree.body:
        section = section_of(source, node.lineno - 1)
        home = {"Args": "Arguments", "main": work}.get(getattr(node, "name", None), section)
        if section != home:
            problems.append(f"{node.name} stands in {section or 'no section'}, not in {home}")
        if isinstance(node, ast.Import | ast.ImportFrom) and section:
            problems.append(f"line {node.lineno}: an import below the head of the file")
    if not is_main_block(tree.body[-1]):
        problems.append('the last statement is not `if __name__ == "__main__":`')
    return problems


def line_width(path):
    lines = path.read_text().splitlines()
    return [f"line {i}: {len(line)} characters" for i, line in enumerate(lines, 1) if len(line) > WIDTH]


# Flags ------------------------------------------------------------------------------------------------------


def flag_docstrings(path):
    return [f"{flag.name} has no docstring under it" for flag in flags(path) if not flag.help]


def only_raises(node):
    """True for `if ...: raise`, or a call of `fail` or `sys.exit` in its place."""

    def fails(statement):
        call = statement.value if isinstance(statement, ast.Expr) else None
        named = dotted(call.func) if isinstance(call, ast.Call) else ""
        return isinstance(statement, ast.Raise) or named in ("fail", "sys.exit")

    return isinstance(node, ast.If) and all(map(fails, node.body))


def working_nodes(node):
    """Every node below `node` except assertions and `if ...: raise`: checking a value is not using it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Assert):
            continue
        if only_raises(child):
            for other in child.orelse:
                yield from working_nodes(ast.Module([other], []))
            continue
        yield child
        yield from working_nodes(child)


def attributes(nodes, owner):
    """Names read as `owner.name`, or as getattr(owner, "name")."""
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if dotted(node.value).split(".")[-1] == owner:
                yield node.attr
        elif isinstance(node, ast.Call) and dotted(node.func) == "getattr" and len(node.args) > 1:
            if dotted(node.args[0]) == owner and isinstance(node.args[1], ast.Constant):
                yield node.args[1].value


def derivations(method):
    """(source, target) for every value of `self`, or local, that goes into another one in `__post_init__`."""

    def values(nodes):
        nodes = list(nodes)
        locals_read = {
            f"local {n.id}" for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        }
        return set(attributes(nodes, "self")) | locals_read

    def visit(body, conditions):
        for node in body:
            if isinstance(node, ast.Assert) or only_raises(node):
                yield from visit(getattr(node, "orelse", []), conditions)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                sources = values(ast.walk(node.value)) | conditions
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Attribute):
                            yield from ((source, part.attr) for source in sources)
                        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                            yield from ((source, f"local {part.id}") for source in sources)
            elif hasattr(node, "body"):
                head = [getattr(node, key) for key in ("test", "iter") if hasattr(node, key)]
                inside = conditions.union(*(values(ast.walk(part)) for part in head))
                yield from visit(node.body + getattr(node, "orelse", []), inside)

    yield from visit(method.body, set())


def flag_use(path):
    """Flags that no code reads, and constants that shadow a flag."""
    tree, names = parse(path), {flag.name for flag in flags(path)}
    the_class, edges = class_args(tree), []
    rest = ast.Module([node for node in tree.body if node is not the_class], [])
    read = set(attributes(working_nodes(rest), "args"))
    for method in (node for node in the_class.body if isinstance(node, ast.FunctionDef)):
        if method.name == "__post_init__":
            edges += derivations(method)
        else:  # a property or method is a derived value under its own name
            edges += [(source, method.name) for source in attributes(working_nodes(method), "self")]
    while new := {source for source, target in edges if target in read} - read:
        read |= new
    problems = [f"nothing reads {name}" for name in sorted(names - read)]
    for node in ast.walk(rest):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, int | float | str) and not isinstance(node.value.value, bool):
                ids = [target.id for target in node.targets if isinstance(target, ast.Name)]
                shadowed = [name for name in ids if name.lower() in names]
                problems += [f"line {node.lineno}: the constant {name} shadows a flag" for name in shadowed]
    return problems


def flag_conflicts(paths):
    """Flags that two scripts share without the same type and help."""
    first, problems = {}, []
    for path in paths:
        for flag in (flag for flag in flags(path) if flag.name not in METHOD_FLAGS):
            home, other = first.setdefault(flag.name, (path.name, flag))
            if flag.annotation != other.annotation:
                problems.append(
                    f"{flag.name}: {flag.annotation} in {path.name}, {other.annotation} in {home}"
                )
            if flag.help != other.help:
                problems.append(f"{flag.name}: the help in {path.name} is not the one in {home}")
    return problems


# Code -------------------------------------------------------------------------------------------------------


def import_effects(path):
    """Module-level statements that are neither imports, constants nor definitions."""
    tree = parse(path)
    allowed = CONSTANT_CALLS | {node.name for node in tree.body if isinstance(node, ast.ClassDef)}

    def effects(body):
        for node in body:
            if isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
            ):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) or is_main_block(node):
                continue
            if isinstance(node, ast.Try):  # an optional import
                yield from effects(node.body + node.orelse + node.finalbody)
                yield from (e for handler in node.handlers for e in effects(handler.body))
            elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                yield from effects(node.body)
            elif path.name == "common.py" and re.fullmatch(
                r"Attention\w*\.register\(.*\)", ast.unparse(node)
            ):
                continue  # names an attention for transformers to look up
            elif not isinstance(node, ast.Assign | ast.AnnAssign | ast.Pass):
                yield node
            else:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
                named = all(isinstance(n, ast.Name | ast.Tuple) for n in targets)
                if not named or any(dotted(call.func) not in allowed for call in calls):
                    yield node

    return [f"line {node.lineno}: `{ast.unparse(node).splitlines()[0]}`" for node in effects(tree.body)]


def imports(path):
    """Local imports other than `common`, and wandb imported before it is asked for."""
    tree, problems = parse(path), []
    local = {p.stem for p in path.parent.glob("*.py")} | {p.name for p in path.parent.iterdir() if p.is_dir()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = ["." * node.level + (node.module or "")]
        else:
            continue
        for module in modules:
            top = module.split(".")[0]
            if module.startswith(".") or (
                top in local - {"common"} or (top == "common" and path.name == "common.py")
            ):
                problems.append(f"line {node.lineno}: imports {module}; only `common` is shared")
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Import | ast.ImportFrom)
            and "wandb" in ast.unparse(node)
            and id(node) not in inside
        ):
            problems.append(f"line {node.lineno}: wandb is imported although --wandb may not be given")
    return problems


def names(path):
    """Variables, arguments and fields whose name says nothing, or is another name for what has one."""
    found = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append((node.lineno, node.id))
        elif isinstance(node, ast.arg):
            found.append((node.lineno, node.arg))
    banned = [(line, n) for line, n in found if UNUSED_NAMES.fullmatch(n) or n in OTHERS_NAMES]
    return [f"line {line}: {name}" for line, name in sorted(set(banned))]


def purity(path):
    """Algorithm functions that know of flags, devices, processes or logging."""
    problems = []
    for function in top_functions(path, "Algorithm"):
        for node in ast.walk(function):
            name = dotted(node) if isinstance(node, ast.Name | ast.Attribute) else ""
            impure = IMPURE.fullmatch(name)
            called = node.func if isinstance(node, ast.Call) else None
            moves = isinstance(called, ast.Attribute) and called.attr in ("cuda", "to")
            device = (
                isinstance(node, ast.Constant) and node.value in ("cuda", "cpu") or name == "torch.device"
            )
            if impure or moves or device or (isinstance(node, ast.arg) and node.arg in ("args", "device")):
                problems.append(
                    f"line {getattr(node, 'lineno', 0)}: {function.name} uses `{ast.unparse(node)}`"
                )
    return problems


def docstrings(path):
    """Public functions without a docstring: in a script those of its Algorithm, elsewhere all."""
    section = "Algorithm" if sections(path.read_text()) and path.name != "common.py" else None
    public = (node for node in top_functions(path, section) if not node.name.startswith("_"))
    return [
        f"line {node.lineno}: {node.name} has no docstring" for node in public if not ast.get_docstring(node)
    ]


def common_is_maths(path):
    """Output, files or a command line in the shared module."""
    problems = []
    for node in ast.walk(parse(path)):
        name = dotted(node) if isinstance(node, ast.Name) else ""
        module = ast.unparse(node) if isinstance(node, ast.Import | ast.ImportFrom) else ""
        if name in ("print", "open", "logging", "logger") or re.search(
            r"\b(tyro|argparse|logging|wandb|tqdm)\b", module
        ):
            problems.append(f"line {node.lineno}: {ast.unparse(node)}")
    return problems


def noise_of_import(path, capfd, folder, monkeypatch):
    """What executing the module's top level changes, its libraries being loaded already."""
    import torch

    def state():
        return {
            "threads": threading.active_count(),
            "environment": dict(os.environ),
            "random numbers": (random.getstate(), torch.get_rng_state().tolist()),
            "torch settings": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
            "files": sorted(os.listdir(folder)),
        }

    libraries = [node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(libraries, []), path, "exec"), {})
    spec = importlib.util.spec_from_file_location(f"imported_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up there
    monkeypatch.chdir(folder)
    random.random(), torch.rand(1)  # so that seeding once more cannot go unseen
    capfd.readouterr()
    before = state()
    spec.loader.exec_module(module)
    after, output = state(), capfd.readouterr()
    problems = [f"importing changes: {key}" for key in before if before[key] != after[key]]
    return problems + [f"importing prints: {text}" for text in output if text]


SCRIPT_CHECKS = [
    layout,
    flag_docstrings,
    flag_use,
    import_effects,
    imports,
    names,
    purity,
    docstrings,
    line_width,
]
COMMON_CHECKS = [common_is_maths, import_effects, imports, names, docstrings, line_width]


# The repository ---------------------------------------------------------------------------------------------


def by_name(value):
    return value.name if hasattr(value, "name") else value.__name__


@pytest.mark.parametrize("check", SCRIPT_CHECKS, ids=by_name)
@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_script(path, check):
    assert not check(path)


@pytest.mark.parametrize("check", COMMON_CHECKS, ids=by_name)
@pytest.mark.parametrize("path", COMMON, ids=by_name)
def test_common(path, check):
    assert not check(path)


@pytest.mark.parametrize("path", [path for path in MODULES if path not in SCRIPTS + COMMON], ids=by_name)
def test_other_module(path):
    assert not [problem for check in (import_effects, imports, names, docstrings) for problem in check(path)]


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_importing_has_no_side_effect(path, capfd, tmp_path, monkeypatch):
    assert not noise_of_import(path, capfd, tmp_path, monkeypatch)


def test_shared_flags_have_the_same_type_and_help():
    assert not flag_conflicts(SCRIPTS)


@pytest.mark.parametrize("folder", ["tests", "tiny", "benchmarks", "docs"])
def test_line_width_of_the_other_folders(folder):
    assert not {p.name: line_width(p) for p in (ROOT / folder).rglob("*.py") if line_width(p)}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


# The checks themselves: each rule broken once ---------------------------------------------------------------

OTHER_RULE = "# " + "=" * 108
BROKEN = [
    (layout, "# Algorithm", "# Maths"),
    (layout, RULE, OTHER_RULE),
    (layout, "# No momentum.", OTHER_RULE),
    (layout, '"""Fits one number by gradient descent.', 'A = """Not a docstring.'),
    (layout, "# No momentum.", "import os"),
    (layout, "def descend", "def main(args):\n    pass\n\n\ndef descend"),
    (layout, "    main(tyro.cli(Args))\n", "    main(tyro.cli(Args))\n\nLATE = 1\n"),
    (flag_docstrings, '    """Print the loss."""\n', ""),
    (flag_docstrings, '"""Half of the steps, over which the rate is constant."""', '"""  """'),
    (flag_use, "args.verbose", "True"),
    (flag_use, "args.rate", "0.5"),  # __post_init__ still checks it
    (flag_use, "args.half", "3"),  # and with it num_steps, which only feeds half
    (flag_use, "    x = 0.0", "    num_steps = 3\n    x = 0.0"),
    (flag_use, "# No momentum.", "RATE = 0.5\n\n\n# No momentum."),
    (import_effects, "# No momentum.", 'print("hello")\n\n\n# No momentum.'),
    (import_effects, "# No momentum.", 'os.environ["A"] = "b"\n\n\n# No momentum.'),
    (import_effects, "# No momentum.", "DEVICE = torch.device('cuda')\n\n\n# No momentum."),
    (imports, "import tyro", "import other"),
    (imports, "import tyro", "from .common import gae"),
    (imports, "    x = 0.0", "    import other\n    x = 0.0"),
    (imports, "import tyro", "import wandb"),
    (names, "gradient", "tmp"),
    (names, "target, rate):", "data, rate):"),
    (names, "gradient", "loss1"),
    (names, "new", "mask"),
    (names, "new", "per_token_logps"),
    (purity, "(x, target):\n", "(x, target, args):\n"),
    (purity, "return 0.5", "print(x)\n    return 0.5"),
    (purity, "return 0.5 * (x", "return 0.5 * (x.to(y)"),
    (purity, "return 0.5 * (x", "return 0.5 * (x.cuda()"),
    (purity, "return 0.5", "wandb.log(x)\n    return 0.5"),
    (docstrings, '    """Half the squared distance of the numbers `x` and `target`."""\n', ""),
    (line_width, "# No momentum.", "# " + "x" * 109),
    (common_is_maths, "import tyro", "import logging"),
    (common_is_maths, "import tyro", "import tyro"),
]


@pytest.mark.parametrize(
    ("check", "old", "new"), BROKEN, ids=[f"{c.__name__}-{i}" for i, (c, *_) in enumerate(BROKEN)]
)
def test_broken_rule_is_found(fake, check, old, new):
    fake("other.py")
    assert check(fake("fake.py", (old, new)))


def test_rules_are_not_overzealous(fake):
    derived = (
        "        self.half = self.num_steps // 2\n",
        "        steps = self.num_steps\n        if self.verbose:\n            steps += 1\n"
        "        self.half = steps // 2\n",
    )
    optional = (
        "import tyro\n",
        'try:\n    import fast\nexcept ImportError:\n    fast = None\n\nimport tyro\n\nA = {"b": -1}\n',
    )
    lazily = ("    x = 0.0", "    import wandb\n\n    x = 0.0")
    for edits in [()], [derived, ("args.verbose", "True")], [optional], [lazily]:
        path = fake("fake.py", *(edit for edit in edits if edit))
        assert not [problem for check in SCRIPT_CHECKS for problem in check(path)]
    assert common_is_maths(path)  # a script has a command line
    assert not common_is_maths(fake("common.py", ("import tyro\n", ""), ("print(", "repr(")))


def test_flag_conflicts_are_found(fake):
    a = fake("a.py")
    assert not flag_conflicts(
        [a, fake("b.py", ("rate: float = 0.1", "rate: float = 0.2"))]
    )  # defaults are each one's own
    assert flag_conflicts([a, fake("b.py", ("Print the loss", "Print everything"))])
    assert flag_conflicts([a, fake("b.py", ("rate: float", "rate: int"))])
    beta = [fake(f"{n}.py", ("rate", "beta"), ("Step size", f"Size {n}")) for n in ("c", "d")]
    assert not flag_conflicts(beta)


EFFECTS = {
    "prints": "print(1)",
    "environment": "import os; os.environ['A_B'] = 'c'",
    "random numbers": "import torch; torch.manual_seed(1234)",
    "files": "open('f', 'w').close()",
}


@pytest.mark.parametrize("kind", EFFECTS)
def test_side_effect_of_importing_is_found(fake, kind, capfd, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.setenv("A_B", "")  # undone after the test
    noisy = fake("noisy.py", ("# No momentum.", EFFECTS[kind]))
    assert [kind in problem for problem in noise_of_import(noisy, capfd, folder, monkeypatch)] == [True]
    assert not noise_of_import(fake("quiet.py"), capfd, folder, monkeypatch)
