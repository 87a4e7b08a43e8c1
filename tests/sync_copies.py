"""Carries one script's version of every shared function to the other scripts.

A function, a class, or a constant of the Plumbing section that has the same name in two scripts is the same
text in both. Edit it in one script, then

    python tests/sync_copies.py grpo.py            # carry grpo.py's version to every script that has the name
    python tests/sync_copies.py grpo.py --check    # only say what differs; exit status 1 when something does

`main`, `Args` and `COLUMNS` are each script's own. The text carried starts at the comment above
it. What a copied function needs is not imported for it: ruff (F821) finds what is missing.
"""

import argparse
import ast
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RULE = "# " + "-" * 108
SECTIONS = ["Arguments", "Algorithm", "Training", "Plumbing"]
OWN = {"main", "Args", "COLUMNS"}  # what a script does and shows is its own


class Definition(NamedTuple):
    """A top-level function, class or plumbing constant: lines[start:end] of its file."""

    name: str
    start: int
    end: int
    text: str


def scripts(root: Path = ROOT) -> list[Path]:
    """The *.py files of `root` that define a class `Args` and a function `main`."""
    marks = [re.compile(mark, re.MULTILINE) for mark in (r"^class Args\b", r"^def main\b")]
    return [p for p in sorted(root.glob("*.py")) if all(mark.search(p.read_text()) for mark in marks)]


def sections(source: str) -> list[tuple[str, int]]:
    """(title, 0-based line of the banner's first rule) of every section banner, in order of appearance."""
    banner = re.compile(rf"^{RULE}\n# (\S.*)\n{RULE}$", re.MULTILINE)
    return [(match[1], source.count("\n", 0, match.start())) for match in banner.finditer(source)]


def section_of(source: str, line: int) -> str:
    """The title of the section in which the 0-based `line` stands, "" above the first banner."""
    return next((title for title, start in reversed(sections(source)) if start <= line), "")


def definitions_of(source: str) -> list[Definition]:
    """Every top-level function and class, and the constants of Plumbing, with the comments above them."""
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body:
        name = getattr(node, "name", None)  # of a function or a class
        if isinstance(node, ast.Assign | ast.AnnAssign) and section_of(source, node.lineno) == "Plumbing":
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        if name is None:
            continue
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while start > 0 and lines[start - 1].startswith("#") and lines[start - 1] != RULE:
            start -= 1
        end = node.end_lineno
        while end < len(lines) and re.match(r"\s+#", lines[end]):  # comments that close the body
            end += 1
        found.append(Definition(name, start, end, "\n".join(lines[start:end])))
    return found


def definitions(path: Path) -> dict[str, Definition]:
    """name -> Definition of what `path` may share with its siblings."""
    return {d.name: d for d in definitions_of(path.read_text()) if d.name not in OWN}


def drifted(paths: list[Path]) -> dict[str, list[list[str]]]:
    """Names that are not the same text everywhere: name -> its variants, each a list of files."""
    variants = {}
    for path in paths:
        for name, definition in definitions(path).items():
            variants.setdefault(name, {}).setdefault(definition.text, []).append(path.name)
    return {name: list(texts.values()) for name, texts in variants.items() if len(texts) > 1}


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file at once: whoever reads it sees the old text or the new one, never half."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
    os.chmod(file.name, path.stat().st_mode)
    os.replace(file.name, path)


def carry(source: Path, targets: list[Path], write: bool = True) -> list[tuple[Path, str]]:
    """Gives `targets` the text that `source` has for every name they share; returns what differed."""
    wanted, changes = definitions(source), []
    for target in targets:
        lines, own = target.read_text().splitlines(), definitions(target)
        stale = [d for name, d in own.items() if name in wanted and d.text != wanted[name].text]
        for old in sorted(stale, key=lambda d: -d.start):  # from below: earlier line numbers stay true
            lines[old.start : old.end] = wanted[old.name].text.splitlines()
        changes += [(target, d.name) for d in stale]
        if stale and write:
            write_atomically(target, "\n".join(lines) + "\n")
    return changes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path, help="the script whose version wins")
    parser.add_argument("--check", action="store_true", help="only report; exit status 1 when copies differ")
    args = parser.parse_args()
    source = (args.script if args.script.exists() else ROOT / args.script).resolve()
    siblings = scripts(source.parent)
    if source not in siblings:
        parser.error(f"{args.script} is not a script (a file that defines `Args` and `main`)")
    changes = carry(source, siblings, write=not args.check)
    for target, name in changes:
        print(f"{target.name}: {name} {'differs from' if args.check else 'taken from'} {source.name}")
    return int(args.check and bool(changes))


if __name__ == "__main__":
    sys.exit(main())
