"""Writes what the documentation says about code and results from the code and the results.

    python tests/sync_docs.py            # rewrite the generated parts
    python tests/sync_docs.py --check    # only say what is out of date; exit status 1 when something is

Generated, in README.md and docs/*.md: the table of flags after `<!-- flags:begin -->`, the columns Lines and
Result of the table after `<!-- scripts:begin -->`, and all that stands between `<!-- results:begin NAME -->`
and `<!-- results:end -->` (benchmarks/result_tables.py). tests/README.md describes the marks.
"""

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

from sync_copies import ROOT, scripts, write_atomically

sys.path.insert(0, str(ROOT / "benchmarks"))
from result_tables import as_table, headline, results_block


class Flag(NamedTuple):
    """One field of `Args`, as text; `default` is None where the flag is required."""

    name: str
    annotation: str
    default: str | None
    help: str
    group: str


# Flags ------------------------------------------------------------------------------------------------------


def class_args(tree: ast.Module) -> ast.ClassDef:
    """The `class Args` of a parsed script."""
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")


def flags(script: Path) -> list[Flag]:
    """The fields of the script's `Args`, in order, without importing it.

    The help stands behind a field, else directly above it. A comment after an empty line begins a group.
    """
    source = script.read_text()
    node, lines, found, group = class_args(ast.parse(source)), source.splitlines(), [], ""
    for field in node.body:
        if not isinstance(field, ast.AnnAssign):
            continue
        top = field.lineno - 1  # 0-based: the field's line, then the first comment line above it
        while lines[top - 1].lstrip().startswith("#"):
            top -= 1
        above = [line.strip().lstrip("# ") for line in lines[top : field.lineno - 1]]
        if above and (not lines[top - 1].strip() or top == node.lineno):
            group, above = above[0], above[1:]
        rest = lines[field.end_lineno - 1].encode()[field.end_col_offset :].decode().strip()
        text = rest.lstrip("# ") or " ".join(above)
        default = field.value and ast.get_source_segment(source, field.value)
        found.append(Flag(field.target.id, ast.unparse(field.annotation), default, text, group))
    return found


def readable(annotation: str, constants: dict[str, str]) -> str:
    """A type with the module's constants in their place, as choices and ranges."""

    def bounds(match):
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        known = re.findall(r"(gt|ge|lt|le)=([^,]+)", match[2])
        return " ".join([match[1], *(f"{signs[name]} {value}" for name, value in known)])

    kind = re.sub(r"Annotated\[(.*?), tyro\.conf\..*\]", r"\1", annotation).replace("loading.", "")
    kind = re.sub(r"\w+", lambda word: constants.get(word[0], word[0]), kind)
    kind = re.sub(r"Literal\[(.*?)\]", lambda match: re.sub("['\"]", "", match[1]), kind)
    return re.sub(r"Annotated\[(\w+), (?:pydantic\.)?Field\(([^()]*)\)\]", bounds, kind)


def flag_table(script: Path) -> str:
    """The Markdown table of the script's flags, a row of its own for each group."""
    sources = [path.read_text() for path in (script.with_name("loading.py"), script) if path.exists()]
    assigned = [x for text in sources for x in ast.parse(text).body if isinstance(x, ast.Assign)]
    constants = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in assigned}
    rows, group = [["Flag", "Type", "Default", "Meaning"]], ""
    for flag in flags(script):
        if flag.group != group:
            group = flag.group
            rows.append([f"**{group}**", "", "", ""])
        name = flag.name.rstrip("_").replace("_", "-")  # lambda_ is --lambda
        names = f"`--{name}`, `--no-{name}`" if flag.annotation == "bool" else f"`--{name}`"
        default = re.sub(r'^"([^"]+)"$', r"\1", flag.default or "")
        kind = readable(flag.annotation, constants)
        rows.append([names, f"`{kind}`", f"`{default}`" if default else "required", flag.help])
    return as_table([[cell.replace("|", r"\|") for cell in row] for row in rows])


# Markdown ---------------------------------------------------------------------------------------------------


def page_of(script: Path) -> Path:
    """Where the script's page stands, written yet or not."""
    return script.parent / "docs" / f"{script.stem}.md"


def between(text: str, name: str) -> str | None:
    """What stands between `<!-- name:begin -->` and `<!-- name:end -->`, None without the marks."""
    match = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", text, re.DOTALL)
    return match and match[1]


def replace_between(text: str, name: str, new: str) -> str:
    """`text` with `new` between the marks `name`."""
    start, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return re.sub(rf"{start}\n.*?{end}", lambda _: f"{start}\n{new.strip()}\n{end}", text, flags=re.DOTALL)


def table(text: str) -> list[list[str]]:
    """The rows of the Markdown tables in `text`, header first, as lists of stripped cells; no rule rows."""
    rows = [line.strip().strip("|") for line in text.splitlines() if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for row in rows]
    return [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]


def documented_metrics(script: Path, conditional: bool = True) -> set[str]:
    """The keys of the "Logged metrics" table of the script's page: what is in backticks in its first cells.

    A parenthesis behind a key says when it is logged: `conditional=False` leaves such a row out.
    """
    page = page_of(script)
    rows = table(between(page.read_text(), "metrics") or "") if page.exists() else []
    cells = [row[0] for row in rows[1:] if conditional or not re.search(r"`[^`]*`\s*\(", row[0])]
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def metric_differences(script: Path, emitted: set[str]) -> list[str]:
    """What is logged but not documented, and what is documented, without a condition, but not logged."""

    def covers(documented, key):
        return re.fullmatch(r"[^/]+".join(map(re.escape, re.split(r"<[^>]*>", documented))), key)

    every, always = documented_metrics(script), documented_metrics(script, conditional=False)
    unknown = [key for key in sorted(emitted) if not any(covers(d, key) for d in every)]
    missing = [d for d in sorted(always) if not any(covers(d, key) for key in emitted)]
    return [f"{key} is not documented" for key in unknown] + [f"{d} is not logged" for d in missing]


# Generation -------------------------------------------------------------------------------------------------


def with_scripts(readme: str, root: Path) -> str:
    """The README with the columns Lines and Result of its script table written afresh."""
    rows = table(between(readme, "scripts") or "")
    for row in rows[1:]:
        name = re.search(r"\w+\.py", row[0])
        if name and (root / name[0]).exists():
            row[rows[0].index("Lines")] = f"{len((root / name[0]).read_text().splitlines()):,}"
            row[rows[0].index("Result")] = headline(name[0], root)
    return replace_between(readme, "scripts", as_table(rows)) if rows else readme


def with_results(text: str, root: Path) -> str:
    """`text` with every block of results written afresh; one without its file says so."""

    def block(match):
        try:
            new = results_block(match[1], root)
        except FileNotFoundError:
            new = "Not measured."
        return f"<!-- results:begin {match[1]} -->\n{new}\n<!-- results:end -->"

    return re.sub(r"<!-- results:begin (.*?) -->\n.*?<!-- results:end -->", block, text, flags=re.DOTALL)


def outdated(root: Path = ROOT) -> dict[Path, str]:
    """The documents whose generated parts are not what the files on disk say: path -> the right text."""
    wanted = {path: with_results(path.read_text(), root) for path in sorted((root / "docs").glob("*.md"))}
    for script in scripts(root):
        if (page := page_of(script)) in wanted:
            wanted[page] = replace_between(wanted[page], "flags", flag_table(script))
    if (readme := root / "README.md").exists():
        wanted[readme] = with_results(with_scripts(readme.read_text(), root), root)
    return {path: text for path, text in wanted.items() if text != path.read_text()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only report; exit status 1 when outdated")
    args, changes = parser.parse_args(), outdated()
    for path, text in changes.items():
        if not args.check:
            write_atomically(path, text)
        print(f"{path.relative_to(ROOT)}: {'out of date' if args.check else 'rewritten'}")
    return int(args.check and bool(changes))


if __name__ == "__main__":
    sys.exit(main())
