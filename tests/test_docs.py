"""What the README and the docs pages claim, held against files, dataclasses and measured results."""

import ast
import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import shlex
import sys
from types import SimpleNamespace

import pytest
import tyro
from conftest import DATA, read_lines
from sync_copies import ROOT, scripts
from sync_docs import between, documented_metrics, flag_table, metric_differences, outdated, page_of, table

README = ROOT / "README.md"
HEADINGS = "Overview|Papers and reference code|Usage|Flags|Logged metrics|Implementation details|"
HEADINGS += "Deviations from the paper|Differences from its sibling|Results|Known limits and negative results"


def fences(text):
    """(language, code) of each fenced block."""
    return re.findall(r"^[ \t]*```([\w-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", text, re.DOTALL | re.MULTILINE)


def prose(text):
    """`text` without its fenced blocks."""
    return re.sub(r"^[ \t]*```.*?^[ \t]*```[ \t]*$", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text):
    """The commands of the bash blocks, as lists of words, continued lines joined."""
    return [words for language, code in fences(text) if language in ("bash", "sh") for words in split(code)]


def split(code):
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        while words:  # one list per part of `a && b | c`
            end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";", "&", ">")), len(words))
            named = next((i for i, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word)), 0)
            yield words[named:end]
            words = words[end + 1 :]


@functools.cache
def load(path, changed):
    """What the module at `path` defines, as of the time `changed`."""
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def parse_error(script, argv):
    """Why the script would refuse `argv`, "" when it accepts it: its own call of tyro.cli, without main."""
    calls = [n for n in ast.walk(ast.parse(script.read_text())) if isinstance(n, ast.Call)]
    call = next(ast.unparse(call) for call in calls if ast.unparse(call.func) == "tyro.cli")
    names, output = load(script, script.stat().st_mtime_ns), io.StringIO()
    names = names | {"tyro": SimpleNamespace(cli=functools.partial(tyro.cli, args=argv))}
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            eval(call, names)
        except SystemExit as stop:
            return f"{output.getvalue()} {stop.code}" if stop.code else ""
        except Exception as error:  # from __post_init__
            return repr(error)
    return ""


def command_problems(words, root):
    """What is wrong with a command that starts a Python file of the repository."""
    shown, at = shlex.join(words), next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if words and words[0].startswith("-"):
        return [f"`{shown}`: the line before it should end in a backslash"]
    if at is None or words[0] not in ("python", "torchrun") or words[1] == "-m":
        return []
    path, options = root / words[at], words[at + 1 :]
    if path not in scripts(root):
        return [] if path.exists() else [f"`{shown}`: there is no {words[at]}"]
    problems = parse_error(path, options)
    if re.search(r"--model \w+/\S*\dB\b", shown):  # billions of parameters: not at the rates that suit tiny/
        rates = r"^    (learning_rate|beta|kl_coef):(?!.* = 0\.0\b)"
        known = [name.replace("_", "-") for name in re.findall(rates, path.read_text(), re.MULTILINE)]
        problems += "".join(f" no --{name}" for name in known if f"--{name}" not in options)
    return [f"`{shown}`: {problems}"] if problems else []


def headings(text):
    """(level, title) of each heading."""
    return [(len(m[1]), m[2]) for m in re.finditer(r"^(#+) (.*?)[ #]*$", prose(text), re.MULTILINE)]


def page_problems(page):
    text = page.read_text()
    titles = [title for level, title in headings(text) if level == 2]
    problems = [] if "|".join(titles) == HEADINGS else [f"headings are {titles}"]
    return problems + [f"no marks for {name}" for name in ("flags", "metrics") if between(text, name) is None]


def link_problems(document, root):
    """Links and images that lead to no file or heading of the repository."""
    text = re.sub(r"`[^`\n]*`", "", prose(document.read_text()))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    targets += re.findall(r"(?:src|srcset|href)=\"([^\"\s]+)", text)
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    problems = []
    for target in (target for target in targets if not re.match(r"[a-z]+:", target)):  # https:, mailto:
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists() or not path.is_relative_to(root):
            problems.append(f"{target} is not in the repository")
        elif anchor and path.suffix == ".md":
            titles = [title.lower() for _, title in headings(path.read_text())]
            if anchor not in [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]:
                problems.append(f"{target} has no such heading")
    return problems


def result_problems(document, root):
    """Measured numbers outside of a generated block, and blocks of results that do not exist."""
    text = re.sub(r"`<!--.*?-->`", "", prose(document.read_text()))  # a mark that is only shown
    blocks = r"<!-- (results):begin (.*?) -->\n.*?<!-- results:end -->|<!-- scripts:begin.*?scripts:end -->"
    names = [name for _, spec in re.findall(blocks, text, re.DOTALL) for name in spec.split()]
    folder, rest = root / "benchmarks" / "results", re.sub(blocks, "", text, flags=re.DOTALL)
    problems = [n for n in names if n != "commands" and not (folder / f"{n.partition('#')[0]}.json").exists()]
    return problems + re.findall(r"<!-- result.*", rest) + re.findall(r".*\d\s*(?:±|\+/?-)\s*\d.*", rest)


def readme_problems(root):
    """The README's script table against the files on disk."""
    rows = table(between((root / "README.md").read_text(), "scripts") or "|Status|")
    named = [re.search(r"\w+\.py", row[0])[0] for row in rows[1:]]
    problems = [] if sorted(named) == [path.name for path in scripts(root)] else [f"the table has {named}"]
    status = rows[0].index("Status")
    problems += [row[0] for row in rows[1:] if row[status] not in ("checked", "runs", "learns", "reproduces")]
    return problems + [f"{name} has no page" for name in named if not page_of(root / name).exists()]


def problems_of(document, root):
    """All that is wrong with a document."""
    shown = commands(document.read_text())
    found = [problem for words in shown for problem in command_problems(words, root)]
    found += link_problems(document, root) + result_problems(document, root)
    found += page_problems(document) if root / f"{document.stem}.py" in scripts(root) else []
    return found + (readme_problems(root) if document == root / "README.md" else [])


DOCUMENTS = [README, *sorted(ROOT.glob("[!r]*/*.md"))]  # without runs/


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_document_holds(document):
    assert not problems_of(document, ROOT)


def test_readmes_own_test_command_is_what_ci_runs_and_ci_stops_at_the_first_error():
    lines = [line.strip() for _, code in fences(README.read_text()) for line in code.splitlines()]
    ci = ROOT / ".ci" / "run"
    assert [line for line in ci.read_text().splitlines() if "pytest" in line and line in lines]
    assert os.access(ci, os.X_OK) and "\nset -euo pipefail\n" in ci.read_text()


def test_generated_parts_are_up_to_date():
    assert not [path.name for path in outdated()], "run `python tests/sync_docs.py`"


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.name)
def test_commands_in_a_scripts_docstring_parse(script):
    text = re.sub(r"\\\n", " ", ast.get_docstring(ast.parse(script.read_text())))
    lines = re.findall(r"^ *((?:[A-Z_]+=\S+ )*(?:python|torchrun) .*\.py\b.*)$", text, re.MULTILINE)
    shown = [words for line in lines for words in split(line)]
    assert shown and not [problem for words in shown for problem in command_problems(words, ROOT)]


def test_figures_are_at_most_1600_pixels_wide():
    figures = (ROOT / "docs" / "img").glob("*.png")  # a PNG has its width at byte 16
    assert not [p.name for p in figures if int.from_bytes(p.read_bytes()[16:20], "big") > 1600]


# The checks themselves --------------------------------------------------------------------------------------

PAGE = """# fake

{headings}

<!-- flags:begin -->
<!-- flags:end -->

<!-- metrics:begin -->
| Key | Meaning |
|---|---|
| `loss` | the loss |
| `eval/loss`, `eval/perplexity` | at evaluation |
| `rewards/<name>/mean` | per reward |
| `peak_memory_gb` (CUDA) | memory, as `torch.cuda` has it |
<!-- metrics:end -->

<!-- results:begin r -->
<!-- results:end -->
"""
ROW = "| [`{0}.py`](docs/{0}.md) | 0 | | runs |\n"


@pytest.fixture
def project(fake, tmp_path):
    """A repository of two scripts, with a README, pages and a result that are right."""
    for folder in ("docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    for name in "ab":
        fake(f"{name}.py")
        page = PAGE.format(headings="\n".join(f"## {title}\n" for title in HEADINGS.split("|")))
        (tmp_path / "docs" / f"{name}.md").write_text(page)
    head = "# P\n\n<!-- scripts:begin -->\n| Script | Lines | Result | Status |\n|---|---|---|---|\n"
    readme = head + ROW.format("a") + ROW.format("b") + "<!-- scripts:end -->\n\n## Second part\n"
    (tmp_path / "README.md").write_text(readme)
    result = {"command": "python a.py", "seeds": [1, 2], "cpu_seconds": {"median": 61.2}, "curves": {}}
    result |= {"before": {"acc": {"mean": 0.1, "std": 0.0}}, "after": {"acc": {"mean": 0.62449, "std": 0.0}}}
    (tmp_path / "benchmarks" / "results" / "r.json").write_text(json.dumps(result))
    for path, text in outdated(tmp_path).items():
        path.write_text(text)
    return tmp_path


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return path


def test_generated_parts_say_what_the_files_say_and_are_found_outdated(project):
    page, lines = project / "docs" / "a.md", len((project / "a.py").read_text().splitlines())
    text = page.read_text()
    assert "| `acc` | 0.100 ± 0.000 | 0.624 ± 0.000 |" in text and "61 CPU seconds" in text
    assert "| `--num-steps` | `PositiveInt` | `4` | number of steps, over the whole run |" in text
    assert "| **Output** |" in text and "`--verbose`, `--no-verbose`" in text
    assert not outdated(project) and f"| {lines} |" in (project / "README.md").read_text()
    edit(project / "a.py", "    x = 0.0", "    x = 0.0\n    del x\n    x = 0.0")
    assert list(outdated(project)) == [project / "README.md"]
    edit(project / "benchmarks" / "results" / "r.json", "0.62449", "0.7")
    assert set(outdated(project)) == {project / "README.md", page, page.with_name("b.md")}


def test_flag_table_shows_choices_and_ranges(fake):
    kinds = ("rate: float = 0.1", 'rate: Literal["x", "y"] = "x"'), ("PositiveInt = 4", "Share = 0.5")
    share = ("import PositiveInt\n", "import PositiveInt\n\nShare = Annotated[float, Field(ge=0, le=1)]\n")
    text = flag_table(fake("c.py", *kinds, share))
    assert "| `--rate` | `x, y` | `x` |" in text and "| `--num-steps` | `float >= 0 <= 1` | `0.5` |" in text


def test_documented_metrics_are_compared_with_the_logged_ones(project):
    a, logged = project / "a.py", {"loss", "eval/loss", "eval/perplexity", "rewards/math/mean"}
    names = logged - {"rewards/math/mean"} | {"rewards/<name>/mean"}
    assert documented_metrics(a, conditional=False) == names
    assert documented_metrics(a) == names | {"peak_memory_gb"}
    assert not metric_differences(a, logged) and not metric_differences(a, logged | {"peak_memory_gb"})
    assert metric_differences(a, logged - {"loss"}) == ["loss is not logged"]
    assert metric_differences(a, logged | {"kl"}) == ["kl is not documented"]


@pytest.mark.parametrize("case", read_lines(DATA / "documents.jsonl"), ids=lambda case: case["text"])
def test_command_link_or_number_that_does_not_hold_is_found(project, case):
    readme = project / "README.md"
    readme.write_text(f"{readme.read_text()}\n{case['text']}\n")
    assert (not problems_of(readme, project)) == case["right"]


EDITS = [("README", "`b.py`", "`c.py`"), ("README", "`b.py`", "`a.py`"), ("README", "| runs |", "| works |")]
EDITS += [("docs/a", "## Usage", "## Use"), ("docs/a", "## Res", "### Res"), ("docs/a", "flags:end", "x")]


@pytest.mark.parametrize(("name", "old", "new"), EDITS)
def test_wrong_page_or_table_is_found(project, name, old, new):
    document = project / f"{name}.md"
    assert not problems_of(document, project)
    assert problems_of(edit(document, old, new), project)


def test_large_model_with_the_learning_rate_of_tiny_is_found(project, fake):
    model = ("    rate", "    model: str = 'tiny'  # model\n    learning_rate")
    fake("a.py", model, ("self.rate", "self.learning_rate"))
    command = "python a.py --model Q/X-1.5B".split()
    assert command_problems(command, project)
    assert not command_problems([*command, "--learning-rate", "1"], project)
