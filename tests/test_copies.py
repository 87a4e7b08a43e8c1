"""Same name, same text across scripts; and no two functions that differ only in their names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from sync_copies import ROOT, carry, definitions, drifted, scripts

TOOL = Path(__file__).with_name("sync_copies.py")
SMALLEST_TWIN = 5  # statements; shorter functions look alike by chance


def skeleton(function):
    """Its code with its own names numbered in order of appearance, without docstrings and annotations."""
    nodes = list(ast.walk(function))
    own = {n.arg for n in nodes if isinstance(n, ast.arg)}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ExceptHandler)}
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            node.returns, node.body = None, node.body[ast.get_docstring(node) is not None :]
        if isinstance(node, ast.arg):
            node.annotation = None
    text = re.sub(r"^(\s*[\w.]+): [^=]*= ", r"\1 = ", ast.unparse(function), flags=re.MULTILINE)
    words = list(dict.fromkeys(re.findall(r"(?<!\.)\b[A-Za-z_]\w*", text)))
    return re.sub(r"(?<!\.)\b[A-Za-z_]\w*", lambda w: f"_{words.index(w[0])}" if w[0] in own else w[0], text)


def twins(paths):
    """Functions of different names and equal code, unless `# Twin of <name>: <why>` says so."""
    seen, found = {}, []
    for path in paths:
        source = path.read_text()
        whole = definitions(path)  # holds the comment above, too
        for node in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
            text = ast.get_source_segment(source, node) + (
                whole[node.name].text if node.name in whole else ""
            )
            name, code = node.name, skeleton(node)
            if sum(isinstance(n, ast.stmt) for n in ast.walk(node)) - 1 < SMALLEST_TWIN:
                continue
            for other_path, other, other_text in seen.setdefault(code, []):
                marks = ((name, other_text), (other, text))
                marked = any(re.search(rf"# Twin of {re.escape(n)}: \S", where) for n, where in marks)
                if other != name and not marked:
                    found.append(f"{path.name}:{name} is {other_path.name}:{other} under another name")
            seen[code].append((path, name, text))
    return found


def test_same_name_is_same_text_in_every_script():
    hint = "run `python tests/sync_copies.py <the script that is right>`, or rename what is really different"
    assert not drifted(scripts()), hint


def test_no_function_exists_under_two_names():
    assert not twins(sorted(ROOT.glob("*.py")))


def test_no_script_redefines_what_common_has():
    shared = definitions(ROOT / "common.py").keys()
    assert not {path.name: again for path in scripts() if (again := shared & definitions(path).keys())}


# The checks and the tool themselves -------------------------------------------------------------------------

FIX = ("new = x - step", "new = x - 2 * step")


def run_tool(*arguments):
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)


def test_drift_is_found_in_code_comment_decorator_and_plumbing_constant(fake):
    a = fake("a.py", ("# No momentum.", "SCALE = 1\n\n\n# No momentum."))
    assert set(definitions(a)) == {"square_loss", "SCALE", "descend"}
    comment = ("# No momentum.", "# No momentum, on purpose.")
    for edit in (FIX, comment, ("# No momentum.", "# No momentum.\n@staticmethod")):
        assert drifted([a, fake("b.py", edit)]) == {"descend": [["a.py"], ["b.py"]]}
    assert drifted([a, fake("b.py", ("# No momentum.", "SCALE = 2\n\n\n# No momentum."))]).keys() == {"SCALE"}
    assert not drifted([a, fake("b.py", ("args.num_steps", "3"))])  # main is each script's own


def test_tool_carries_a_drifted_copy_and_leaves_the_rest_alone(fake):
    longer = ("    return new\n", "    return new  # the tail\n\n\ndef extra():\n    return 1\n")
    a = fake("a.py", FIX, ("# No momentum.", "# No momentum,\n# no decay."), longer)
    b = fake("b.py", ("args.num_steps", "3"))
    before = b.read_text()
    check = run_tool(a, "--check")
    assert check.returncode == 1 and "b.py: descend" in check.stdout and b.read_text() == before
    done = run_tool(a)
    assert done.returncode == 0 and "b.py: descend" in done.stdout
    wanted = before.replace(*FIX).replace("# No momentum.", "# No momentum,\n# no decay.")
    assert b.read_text() == wanted.replace("return new\n", "return new  # the tail\n")
    assert run_tool(a, "--check").returncode == 0
    assert not carry(a, [b]) and not list(b.parent.glob(".*"))


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
