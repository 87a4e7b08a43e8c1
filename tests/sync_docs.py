"""Writes what the documentation says about the code from the code itself; the tests run it with --check.

    python tests/sync_docs.py            # rewrite the generated parts
    python tests/sync_docs.py --check    # only say what is out of date; exit status 1 when something is

Generated: the flag table of docs/<script>.md, between `<!-- flags:begin -->` and `<!-- flags:end -->`, from
the fields of `Args`; the "Lines" column of the README's script table, between `<!-- scripts:begin -->` and
`<!-- scripts:end -->`; and the numbers before `<!-- result: file#key -->` markers, from that file, to as many
digits as stand there. The functions here also read what the other documentation tests need;
tests/README.md describes the markers.
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from sync_copies import ROOT, scripts, write_atomically


class Flag(NamedTuple):
    """One field of `Args`, as text; `default` is None where required, `init` is False where derived."""

    name: str
    annotation: str
    default: str | None
    help: str
    init: bool


# The scripts ------------------------------------------------------------------------------------------------


def class_args(tree: ast.Module) -> ast.ClassDef:
    """The `class Args` of a parsed script."""
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")


def flags(script: Path) -> list[Flag]:
    """The fields of the script's `Args`, in order, read without importing it; derived ones included."""
    source = script.read_text()
    body = class_args(ast.parse(source)).body
    found = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        default, init = node.value, True
        if isinstance(default, ast.Call) and ast.unparse(default.func).split(".")[-1] == "field":
            options = {keyword.arg: keyword.value for keyword in default.keywords}
            init = not ("init" in options and ast.unparse(options["init"]) == "False")
            default = options.get("default", options.get("default_factory"))
            if isinstance(default, ast.Lambda):
                default = default.body
            elif "default_factory" in options:
                default = ast.Call(default, [], [])
        if isinstance(default, ast.Constant) and isinstance(default.value, str):
            text = default.value or '""'
        else:
            text = default and (ast.get_source_segment(source, default) or ast.unparse(default))
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        help_text = after.value.value if documented and isinstance(after.value.value, str) else ""
        found.append(
            Flag(node.target.id, ast.unparse(node.annotation), text, " ".join(help_text.split()), init)
        )
    return found


def flag_table(script: Path) -> str:
    """The Markdown table of the script's flags."""
    rows = ["| Flag | Type | Default | Meaning |", "|---|---|---|---|"]
    for flag in flags(script):
        if not flag.init:
            continue
        name = flag.name.rstrip("_").replace("_", "-")  # lambda_ is --lambda
        names = f"`--{name}`, `--no-{name}`" if flag.annotation == "bool" else f"`--{name}`"
        choices = re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", flag.annotation)
        type_text = choices[1].replace("'", "").replace('"', "") if choices else flag.annotation
        type_text = re.sub(r"^Annotated\[(.*?), .*\]$", r"\1", type_text)  # what follows is for tyro
        default = "required" if flag.default is None else f"`{' '.join(flag.default.split())}`"
        cells = [text.replace("|", r"\|") for text in (names, f"`{type_text}`", default, flag.help)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


# Markdown ---------------------------------------------------------------------------------------------------


def page_of(script: Path) -> Path:
    """Where the script's page stands, written yet or not."""
    return script.parent / "docs" / f"{script.stem}.md"


def between(text: str, name: str) -> str | None:
    """What stands between `<!-- name:begin -->` and `<!-- name:end -->`, None without the markers."""
    match = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", text, re.DOTALL)
    return match and match[1]


def replace_between(text: str, name: str, new: str) -> str:
    """`text` with `new` between the markers `name`."""
    start, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return re.sub(rf"{start}\n.*?{end}", lambda _: f"{start}\n{new.strip()}\n{end}", text, flags=re.DOTALL)


def table(text: str) -> list[list[str]]:
    """The rows of the Markdown tables in `text`, header first, as lists of stripped cells; no rule rows."""
    rows = [line.strip().strip("|") for line in text.splitlines() if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for row in rows]
    return [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]


def script_rows(readme: str) -> list[dict[str, str]]:
    """The README's script table as dicts by lower-case column; "file" is the <name>.py of the first cell."""
    rows = table(between(readme, "scripts") or "")
    if not rows:
        return []
    header = [cell.lower() for cell in rows[0]]
    named = [(re.search(r"\w+\.py", row[0]), row) for row in rows[1:]]
    return [dict(zip(header, row, strict=True), file=name[0] if name else "") for name, row in named]


def documented_metrics(script: Path, conditional: bool = True) -> set[str]:
    """The keys of the "Logged metrics" table of the script's page, or an empty set while there is no page.

    A row's keys are what is in backticks in its first cell. `rewards/<name>/mean` stands for a key per name.
    A parenthesis after it says when the key is logged, as in "`peak_memory_gb` (CUDA)": such a row is
    conditional, and `conditional=False` leaves it out.
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
    problems = [
        f"{key} is not documented" for key in sorted(emitted) if not any(covers(d, key) for d in every)
    ]
    return problems + [
        f"{d} is not logged" for d in sorted(always) if not any(covers(d, key) for key in emitted)
    ]


# Results ----------------------------------------------------------------------------------------------------

MARKER = re.compile(r"<!--\s*result:\s*([^\s#]+)#(.*?)\s*-->")
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


def look_up(values, path):
    """The number at the dotted path (names may hold dots, too; digits index lists). KeyError without one."""
    if not path:
        if isinstance(values, bool) or not isinstance(values, int | float):
            raise KeyError("not a number")
        return values
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        name, rest = ".".join(parts[:i]), ".".join(parts[i:])
        if isinstance(values, list) and name.isdigit() and int(name) < len(values):
            return look_up(values[int(name)], rest)
        if isinstance(values, dict) and name in values:
            return look_up(values[name], rest)
    raise KeyError(path)


def agrees(printed, value):
    """True when `value`, rounded to the digits that were printed, is what was printed."""
    printed = printed.replace(",", "").replace("−", "-")
    mantissa, _, exponent = printed.lower().partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(printed) - value) <= unit * (0.5 + 1e-6)


def measured(file: str, key: str, root: Path) -> float:
    """The number that a marker `<!-- result: file#key -->` means; `key` may end in ` / 60` or ` * 100`."""
    path, factor = re.fullmatch(r"\s*(.*?)(?: ([*/] [\d.e+-]+))?\s*", key).groups()
    if not file.startswith("benchmarks/results/"):
        raise KeyError("results live in benchmarks/results/")
    value = look_up(json.loads((root / file).read_text()), path)
    if factor:
        value = value * float(factor[2:]) if factor[0] == "*" else value / float(factor[2:])
    return value


# Generation -------------------------------------------------------------------------------------------------


def with_line_counts(readme: str, root: Path) -> str:
    """The README with the "Lines" column of its script table counted afresh."""
    section = between(readme, "scripts")
    if section is None:
        return readme
    lines, column = section.splitlines(), None
    for i, line in enumerate(lines):
        cells = re.split(r"(?<!\\)\|", line)
        titles = [cell.strip().lower() for cell in cells]
        name = re.search(r"\w+\.py", cells[1]) if len(cells) > 2 else None
        if "lines" in titles:
            column = titles.index("lines")
        elif column and name and (root / name[0]).exists():
            cells[column] = f" {len((root / name[0]).read_text().splitlines())} "
            lines[i] = "|".join(cells)
    return replace_between(readme, "scripts", "\n".join(lines))


def with_results(text: str, root: Path) -> str:
    """`text` with the numbers before `<!-- result: ... -->` as they were measured, to the same digits."""
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        parts, start = [], 0
        for marker in MARKER.finditer(line):
            before, keys = line[start : marker.start()], marker[2].split(",")
            spots = list(NUMBER.finditer(before))[-len(keys) :]
            for spot, key in reversed(list(zip(spots, keys, strict=False))):
                value = measured(marker[1], key, root) if (root / marker[1]).exists() else float(spot[0])
                if not agrees(spot[0], value):
                    digits, comma = len(spot[0].partition(".")[2]), "," * ("," in spot[0])
                    before = f"{before[: spot.start()]}{value:{comma}.{digits}f}{before[spot.end() :]}"
            parts += [before, marker[0]]
            start = marker.end()
        lines[i] = "".join([*parts, line[start:]])
    return "".join(lines)


def outdated(root: Path = ROOT) -> dict[Path, str]:
    """The documents whose generated parts are not what the files on disk say: path -> the right text."""
    wanted = {}
    for script in scripts(root):
        if (page := page_of(script)).exists():
            wanted[page] = with_results(replace_between(page.read_text(), "flags", flag_table(script)), root)
    if (readme := root / "README.md").exists():
        wanted[readme] = with_results(with_line_counts(readme.read_text(), root), root)
    return {path: text for path, text in wanted.items() if text != path.read_text()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="only report; exit status 1 when something is outdated"
    )
    args = parser.parse_args()
    changes = outdated()
    for path, text in changes.items():
        if not args.check:
            write_atomically(path, text)
        print(f"{path.relative_to(ROOT)}: {'out of date' if args.check else 'rewritten'}")
    if not changes:
        print("the generated parts of the documentation are up to date")
    return int(args.check and bool(changes))


if __name__ == "__main__":
    sys.exit(main())
