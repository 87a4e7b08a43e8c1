"""The house style over every module: each check takes a path and returns a list of problems.

The end of the file breaks every rule once, on purpose.
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

SHARED = {"common", "loading", "estimators"}  # what scripts may import
# Physical lines by file; 200 of one that is not listed.
LIMITS = {
    "common": 600,
    "loading": 250,
    "estimators": 290,
    "rewards": 500,
    "mathematics": 500,
    "sandbox": 500,
    "sandbox_judge": 500,
}
LIMITS |= {"ipo_kto_simpo_orpo": 900, "reward_model": 900, "process_reward_model": 900, "ppo_rlhf": 1150}
LIMITS |= {"sft": 690, "dpo": 1020, "online_dpo": 980, "distill": 1200, "merge": 910, "evaluate": 800}
LIMITS |= {"grpo": 930, "dapo": 930, "rloo_remax": 930, "rejection_sampling": 830, "constitutional_ai": 800}
# Flags whose help and type depend on the method: beta weighs a KL, or is an inverse temperature, tau, lambda.
METHOD_FLAGS = {"beta", "loss", "loss_agg", "algorithm", "label_smoothing", "reward", "epsilon_high", "gamma"}
METHOD_FLAGS |= {"models", "base", "judge"}  # what is merged, what is measured
METHOD_FLAGS |= {
    "num_generations",
    "temperature",
    "max_completion_length",
}  # may be 0 where none is trained on
# Names that say nothing or have another name in this house; what a function of Algorithm knows nothing of.
UNUSED = r"(loss|tmp|temp)\d+|tmp|data|mask|per_token_logps|response_ids|action_mask|cliprange|clip_coef"
IMPURE = r"(args|device|print|open|logging|logger|wandb|tqdm|dist|torch\.(cuda|distributed))\b.*|'(cuda|cpu)'"


def parse(path):
    return ast.parse(path.read_text())


def functions(path, section):
    source = path.read_text()
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node for node in found if section in ("", section_of(source, node.lineno))]


def layout(path):
    source = path.read_text()
    tree, titles = ast.parse(source), [title for title, _ in sections(source)]
    work = next((title for title in ("Merging", "Sampling") if title in titles), "Training")  # or nothing
    rules = re.findall(r"^#\s*[-=*#]{20,}.*", source, re.MULTILINE)
    problems = [] if ast.get_docstring(tree) else ["no module docstring"]
    if titles != [*SECTIONS[:2], work, SECTIONS[3]] or rules != [RULE] * 2 * len(titles):
        problems.append(f"sections are {titles}, or a rule line is not the house's")
    for node in tree.body:
        section = section_of(source, node.lineno)
        home = {"Args": "Arguments", "main": work}.get(getattr(node, "name", None), section)
        if section != home or isinstance(node, ast.Import | ast.ImportFrom) and section:
            problems.append(f"line {node.lineno} stands in {section or 'no section'}")
    last = ast.unparse(tree.body[-1])
    return problems + ["the end is not its call"] * (not last.startswith("if __name__ == '__main__':"))


def length(path):
    lines, limit = len(path.read_text().splitlines()), LIMITS.get(path.stem, 200)
    return [f"{lines} lines, its limit is {limit}"] if lines > limit else []


def flag_style(path):
    """Flags that are not one line with a help, a class that checks no ranges, or has no groups."""
    node = class_args(parse(path))
    problems = [f"{flag.name} has no help" for flag in flags(path) if not flag.help]
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and part.lineno != part.end_lineno or isinstance(part, ast.Expr):
            problems.append(f"line {part.lineno} is not one line with its help behind it or above it")
    if not any("pydantic" in ast.unparse(decorator) for decorator in node.decorator_list):
        problems.append("Args is not a @pydantic.dataclasses.dataclass")
    return problems + ["Args begins without a group"] * (not flags(path)[0].group)


def reads(node, owner, own=()):
    """Names read as `owner.name` or getattr(owner, "name"): to check or default one is not to read it."""
    for child in ast.iter_child_nodes(node):
        text = ast.unparse(child) if isinstance(child, ast.Attribute | ast.Call) else ""
        match = re.fullmatch(rf"(?:\w+\.)*{owner}\.(\w+)|getattr\({owner}, '(\w+)'.*\)", text)
        if match and match[1] not in own:
            yield match[1] or match[2]
        checks = r"fail\(|sys\.exit\(" + (
            "|raise" if owner == "self" else ""
        )  # a row may be dropped by raising
        if isinstance(child, ast.If) and re.match(checks, ast.unparse(child.body[0])):
            child = ast.Module(child.orelse, [])
        stored = [ast.unparse(target).partition(".")[2] for target in getattr(child, "targets", [])]
        yield from reads(child, owner, [*own, *stored])


def flag_use(path):
    """Flags that no code reads, and constants that shadow a flag."""
    tree, known = parse(path), {flag.name for flag in flags(path)}
    read = {*reads(class_args(tree), "self")}
    if "getattr(args, name)" in path.read_text():  # the settings of a loss, filled in by their names
        losses = [node for node in functions(path, "Algorithm") if isinstance(node, ast.FunctionDef)]
        read |= {setting.arg for loss in losses for setting in loss.args.kwonlyargs}
    tree.body.remove(class_args(tree))
    read |= {*reads(tree, "args"), *reads(parse(ROOT / "loading.py"), "args")}
    problems = [f"nothing reads {name}" for name in known - read]
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    constants = [node for node in assigned if re.fullmatch(r"[\d.e+-]+|'.*'", ast.unparse(node.value))]
    targets = [ast.unparse(target) for node in constants for target in node.targets]
    return problems + [f"{name} shadows a flag" for name in targets if name.lower() in known]


def flag_conflicts(paths):
    """Flags that two scripts share without the same type and help."""
    seen = {}
    for path in paths:
        for flag in flags(path):
            seen.setdefault(flag.name, {}).setdefault((flag.annotation, flag.help), []).append(path.name)
    return {name: kinds for name, kinds in seen.items() if len(kinds) > 1 and name not in METHOD_FLAGS}


def imports(path):
    """Local imports but of what is shared and a file's judge, wandb unasked for, flags in common.py."""
    tree, problems, common = parse(path), [], path.name == "common.py"
    local = {p.stem for p in path.parent.iterdir()}
    local = (
        local - SHARED | {"tyro", "argparse", "logging", "tqdm"}
        if common
        else local - {*SHARED, f"{path.stem}_judge"}
    )
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)):
        modules = [getattr(node, "module", None) or alias.name for alias in node.names]
        if getattr(node, "level", 0) or any(module.split(".")[0] in local for module in modules):
            problems.append(f"line {node.lineno}: a module that is not shared")
        if "wandb" in modules and node not in inside:
            problems.append(f"line {node.lineno}: wandb is imported although --wandb may not be given")
    return problems


def names(path):
    """Variables, arguments and fields whose name says nothing, or is another name for what has one."""
    nodes = list(ast.walk(parse(path)))
    found = [(n.lineno, n.id) for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    found += [(n.lineno, n.arg) for n in nodes if isinstance(n, ast.arg)]
    return [f"line {line}: {name}" for line, name in sorted(set(found)) if re.fullmatch(UNUSED, name)]


def purity(path):
    """Algorithm functions that know of flags, devices, processes or logging."""
    kinds = ast.Name | ast.Attribute | ast.arg | ast.Constant
    problems = []
    for function in functions(path, "Algorithm"):
        for node in (node for node in ast.walk(function) if isinstance(node, kinds)):
            moves = isinstance(node, ast.Attribute) and node.attr in ("cuda", "to")
            if moves or re.fullmatch(IMPURE, ast.unparse(node)):
                problems.append(f"{function.name} uses `{ast.unparse(node)}`")
    return problems


def docstrings(path):
    """Public functions without a docstring: in a script those of its Algorithm, elsewhere all."""
    section = "Algorithm" if path.name != "common.py" and sections(path.read_text()) else ""
    public = [node for node in functions(path, section) if not node.name.startswith("_")]
    return [f"{node.name} has no docstring" for node in public if not ast.get_docstring(node)]


def noise_of_import(path, capfd, folder, monkeypatch):
    """What executing the module's top level changes, its libraries being loaded already."""
    import torch

    def state():
        torch_state = torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype()
        python_state = threading.active_count(), random.getstate()
        files, environment = sorted(os.listdir(folder)), dict(os.environ)
        return {"files": files, "environment": environment, "python": python_state, "torch": torch_state}

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
    return [key for key in before if before[key] != after[key]] + [text for text in output if text]


MODULE_CHECKS = [imports, names, docstrings, length]
SCRIPT_CHECKS = [layout, flag_style, flag_use, purity, *MODULE_CHECKS]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_module(path):
    checks = SCRIPT_CHECKS if path in SCRIPTS else MODULE_CHECKS
    assert not {check.__name__: found for check in checks if (found := check(path))}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_importing_has_no_side_effect(path, capfd, tmp_path, monkeypatch):
    assert not noise_of_import(path, capfd, tmp_path, monkeypatch)


def test_shared_flags_have_the_same_type_and_help():
    assert not flag_conflicts(SCRIPTS)


def test_tests_and_readme_keep_their_limits():
    tests = sum(len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("*.py"))
    assert tests <= 11_000 and len((ROOT / "README.md").read_text().splitlines()) <= 170


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", *command.split(), "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# The checks themselves: each rule broken once ---------------------------------------------------------------

BROKEN = [
    (layout, "# Algorithm", "# Maths"),
    (layout, RULE, "# " + "=" * 108),
    (layout, '"""Fits one number by gradient descent.', 'A = """Not a docstring.'),
    (layout, "# No momentum.", "import os"),
    (layout, "    main(tyro.cli(Args))\n", "    main(tyro.cli(Args))\n\nLATE = 1\n"),
    (length, "# No momentum.", "#\n" * 200),
    (flag_style, "  # print the loss", ""),
    (flag_style, "    # number of steps,\n    # over the whole run\n", ""),
    (flag_style, "= 0.1  #", "= (\n        0.1\n    )  #"),
    (flag_style, "    verbose", '    """Step size."""\n    verbose'),
    (flag_style, "@pydantic.dataclasses", "@dataclasses"),
    (flag_style, "    # Optimization\n", ""),
    (flag_use, "args.verbose", "True"),
    (flag_use, "args.rate", "0.5"),  # __post_init__ still checks it
    (flag_use, "args.folder", "1"),  # and still gives it a default
    (flag_use, "    x = 0.0", "    num_steps = 3\n    x = 0.0"),
    (flag_use, "# No momentum.", "RATE = 0.5\n\n\n# No momentum."),
    (imports, "import tyro", "import other"),
    (imports, "import tyro", "from .common import gae"),
    (imports, "    x = 0.0", "    import other\n    x = 0.0"),
    (imports, "import tyro", "import wandb"),
    (names, "gradient", "tmp"),
    (names, "target, rate):", "data, rate):"),
    (names, "new", "per_token_logps"),
    (purity, "(x, target):\n", "(x, target, args):\n"),
    (purity, "return 0.5", "print(x)\n    return 0.5"),
    (purity, "return 0.5 * (x", "return 0.5 * (x.to(y)"),
    (purity, "return 0.5", "wandb.log(x)\n    return 0.5"),
    (docstrings, '    """Half the squared distance of the numbers `x` and `target`."""\n', ""),
]


@pytest.mark.parametrize(("check", "old", "new"), BROKEN)
def test_broken_rule_is_found(fake, check, old, new):
    fake("other.py")
    assert check(fake("fake.py", (old, new)))


def test_rules_are_not_overzealous(fake):
    optional = "try:\n    import fast\nexcept ImportError:\n    fast = None\n\nimport tyro\n\nA = {1: -1}\n"
    lazily = ("    x = 0.0", "    import wandb\n\n    x = 0.0")
    for edit in (("fake", "fake"), ("import tyro\n", optional), lazily):
        path = fake("fake.py", edit)
        assert not [problem for check in SCRIPT_CHECKS for problem in check(path)]


def test_flag_conflicts_are_found(fake):
    a, betas = fake("a.py"), [fake(f"{n}.py", ("rate", "beta"), ("step", n)) for n in ("c", "d")]
    assert not flag_conflicts(betas)
    assert not flag_conflicts([a, fake("b.py", ("rate: float = 0.1", "rate: float = 0.2"))])
    for edit in (("print the loss", "print everything"), ("rate: float", "rate: int")):
        assert flag_conflicts([a, fake("b.py", edit)])


def test_side_effects_of_importing_are_found(fake, capfd, tmp_path, monkeypatch):
    (folder := tmp_path / "work").mkdir()
    monkeypatch.setenv("A_B", "")  # undone after the test
    effects = "import os; os.environ['A_B'] = 'c'; random.random(); open('f', 'w').close(); print(1)"
    noisy = fake("noisy.py", ("import tyro", "import random\nimport tyro"), ("# No momentum.", effects))
    found = noise_of_import(noisy, capfd, folder, monkeypatch)
    assert found == ["files", "environment", "python", "1\n"]
    assert not noise_of_import(fake("quiet.py"), capfd, folder, monkeypatch)
