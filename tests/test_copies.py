"""Same name, same text across scripts; and no two functions that differ only in their names."""

import ast
import copy
import re
import subprocess
import sys
from pathlib import Path

from sync_copies import ROOT, carry, definitions, drifted, scripts

TOOL = Path(__file__).with_name("sync_copies.py")
SMALLEST_TWIN = 5  # statements; shorter functions look alike by chance


class Normaliser(ast.NodeTransformer):
    """Renames a function's own names in order of appearance; drops docstrings and annotations."""

    def __init__(self, function):
        nodes = list(ast.walk(function))
        self.own = {n.arg for n in nodes if isinstance(n, ast.arg)}
        self.own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.own |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ExceptHandler) and n.name}
        self.renamed = {}

    def rename(self, name):
        return self.renamed.setdefault(name, f"_{len(self.renamed)}") if name in self.own else name

    def visit_FunctionDef(self, node):
        node.name, node.returns = self.rename(node.name), None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return self.generic_visit(node)

    def visit_Name(self, node):
        node.id = self.rename(node.id)
        return node

    def visit_arg(self, node):
        node.arg, node.annotation = self.rename(node.arg), None
        return node

    def visit_ExceptHandler(self, node):
        node.name = node.name and self.rename(node.name)
        return self.generic_visit(node)

    def visit_AnnAssign(self, node):
        node = self.generic_visit(node)
        return ast.Assign(targets=[node.target], value=node.value, lineno=node.lineno) if node.value else None


def functions(tree, prefix=""):
    """(qualified name, node) of every function, methods and inner functions included."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        name = f"{prefix}{node.name}" if named else prefix
        if isinstance(node, ast.FunctionDef):
            yield name, node
        yield from functions(node, f"{name}." if named else prefix)


def twins(paths):
    """Functions of different names and equal syntax trees, unless `# Twin of <name>: <why>` says so."""
    seen, found = {}, []
    for path in paths:
        source = path.read_text()
        whole = definitions(path)  # holds the comment above, too
        for name, node in functions(ast.parse(source)):
            text = ast.get_source_segment(source, node)
            text += whole[name].text if name in whole else ""
            node = Normaliser(node).visit(copy.deepcopy(node))
            if sum(isinstance(n, ast.stmt) for n in ast.walk(node)) - 1 < SMALLEST_TWIN:
                continue
            for other_path, other, other_text in seen.setdefault(ast.dump(node), []):
                marked = any(
                    re.search(rf"# Twin of {re.escape(n)}: \S", t)
                    for n, t in ((name, other_text), (other, text))
                )
                if other != name and not marked:
                    found.append(f"{path.name}:{name} is {other_path.name}:{other} under another name")
            seen[ast.dump(node)].append((path, name, text))
    return found


def redefined(paths, common):
    """Names that a script defines although common.py has them."""
    shared = definitions(common)
    return [
        f"{path.name}: {name} is common.py's"
        for path in paths
        for name in definitions(path)
        if name in shared
    ]


# The repository ---------------------------------------------------------------------------------------------


def test_same_name_is_same_text_in_every_script():
    hint = "run `python tests/sync_copies.py <the script that is right>`, or rename what is really different"
    assert not drifted(scripts()), hint


def test_no_function_exists_under_two_names():
    assert not twins(sorted(ROOT.glob("*.py")))


def test_no_script_redefines_what_common_has():
    if (ROOT / "common.py").exists():
        assert not redefined(scripts(), ROOT / "common.py")


# The checks and the tool themselves -------------------------------------------------------------------------

FIX = ("new = x - step", "new = x - 2 * step")


def run_tool(*arguments):
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)


def test_drift_is_found_in_code_comment_decorator_and_plumbing_constant(fake):
    a = fake("a.py", ("# No momentum.", "SCALE = 1\n\n\n# No momentum."))
    assert set(definitions(a)) == {"square_loss", "SCALE", "descend"}
    for edit in (
        FIX,
        ("# No momentum.", "# No momentum, on purpose."),
        ("# No momentum.", "# No momentum.\n@staticmethod"),
    ):
        assert drifted([a, fake("b.py", edit)]) == {"descend": [["a.py"], ["b.py"]]}
    assert drifted([a, fake("b.py", ("# No momentum.", "SCALE = 2\n\n\n# No momentum."))]).keys() == {"SCALE"}
    assert not drifted([a, fake("b.py", ("args.half", "args.num_steps"))])  # main is each script's own


def test_tool_carries_a_drifted_copy_and_leaves_the_rest_alone(fake):
    longer = ("    return new\n", "    return new  # the tail\n\n\ndef extra():\n    return 1\n")
    a = fake("a.py", FIX, ("# No momentum.", "# No momentum,\n# no decay."), longer)
    b = fake("b.py", ("args.half", "args.num_steps"))
    before = b.read_text()
    check = run_tool(a, "--check")
    assert check.returncode == 1 and "b.py: descend" in check.stdout and b.read_text() == before
    done = run_tool(a)
    assert done.returncode == 0 and "b.py: descend" in done.stdout
    wanted = before.replace(*FIX).replace("# No momentum.", "# No momentum,\n# no decay.")
    assert b.read_text() == wanted.replace("return new\n", "return new  # the tail\n")
    assert run_tool(a, "--check").returncode == 0
    assert not carry(a, [b]) and not list(b.parent.glob(".*"))


def test_tool_refuses_what_is_not_a_script(tmp_path):
    (tmp_path / "rewards.py").write_text("def main():\n    pass\n")
    assert run_tool(tmp_path / "rewards.py").returncode == 2


def test_twins_are_found_under_renaming_and_excused_by_a_marker(fake):
    a = fake("a.py")
    edits = [("descend", "go_down"), ("gradient", "slope"), ("target, rate):", "target, speed: float):")]
    edits += [("rate *", "speed *"), ("One step of", "A stride of"), ("# No momentum.\n", "")]
    assert twins([a, fake("b.py", *edits)]) == ["b.py:go_down is a.py:descend under another name"]
    assert not twins([a, fake("b.py")])  # a copy under the same name is no twin
    assert not twins([a, fake("b.py", *edits, ("x - step", "x + step"))])
    assert not twins([a, fake("b.py", ("square_loss", "mse"))])  # too short to count
    marker = ("def go_down", "# Twin of descend: it will grow a momentum.\ndef go_down")
    assert not twins([a, fake("b.py", *edits, marker)])


def test_redefining_a_common_name_is_found(fake, tmp_path):
    common = tmp_path / "common.py"
    common.write_text("def descend(x):\n    return x\n")
    assert redefined([fake("a.py")], common) == ["a.py: descend is common.py's"]
