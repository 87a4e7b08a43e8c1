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

import pytest
from sync_copies import ROOT, scripts
from sync_docs import (
    MARKER,
    NUMBER,
    agrees,
    between,
    documented_metrics,
    flag_table,
    measured,
    metric_differences,
    outdated,
    page_of,
    script_rows,
    with_results,
)

README = ROOT / "README.md"
SCRIPTS = scripts()
PAGES = [page_of(script) for script in SCRIPTS if page_of(script).exists()]
HEADINGS = [
    "Overview",
    "Papers and reference code",
    "Usage",
    "Flags",
    "Logged metrics",
    "Implementation details",
    "Deviations from the paper",
    "Differences from its sibling",
    "Results",
    "Known limits and negative results",
]
STATUSES = {"checked", "runs", "learns", "reproduces"}


def documents(root=ROOT):
    """The Markdown files of the repository, without what runs and environments leave there."""
    skipped = {"runs", "wandb", "venv"}
    found = sorted(root.rglob("*.md"))
    return [
        p for p in found if not any(part in skipped or part[0] == "." for part in p.relative_to(root).parts)
    ]


def fences(text):
    """(language, code) of each fenced block."""
    return re.findall(r"^[ \t]*```([\w-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", text, re.DOTALL | re.MULTILINE)


def prose(text):
    """`text` with the lines of fenced blocks emptied, so that line numbers stay."""
    lines, inside = text.splitlines(), False
    for i, line in enumerate(lines):
        fence = line.lstrip().startswith("```")
        lines[i] = "" if fence or inside else line
        inside ^= fence
    return "\n".join(lines)


# Commands ---------------------------------------------------------------------------------------------------


def commands(text):
    """The commands of the bash, sh and console blocks, as lists of words, continued lines joined."""
    blocks = [code for language, code in fences(text) if language in ("bash", "sh", "console")]
    return [words for code in blocks for words in command_lines(code)]


def command_lines(code):
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        while words:  # one list per part of `a && b | c`
            end = next(
                (i for i, word in enumerate(words) if word in ("&&", "||", "|", ";", "&", ">")), len(words)
            )
            part = words[:end]
            while part and re.fullmatch(r"[A-Z_]+=.*", part[0]):
                part = part[1:]
            yield part
            words = words[end + 1 :]


@functools.cache
def load(path, changed):
    """The module at `path` as of the time `changed`, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def parse_error(script, argv):
    """Why the script would refuse `argv`, "" when it accepts it: its own call of tyro.cli, without main."""
    import tyro

    names = vars(load(script, script.stat().st_mtime_ns))
    calls = [n for n in ast.walk(ast.parse(script.read_text())) if isinstance(n, ast.Call)]
    call = next((c for c in calls if ast.unparse(c.func) == "tyro.cli"), None)
    assert call, f"{script.name} never calls tyro.cli"

    def value(node):
        return eval(compile(ast.Expression(node), script, "eval"), names)

    options = {k.arg: value(k.value) for k in call.keywords if k.arg != "args"}
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            tyro.cli(value(call.args[0]), args=argv, **options)
        except SystemExit as stop:
            if stop.code:
                return output.getvalue() + (stop.code if isinstance(stop.code, str) else "")
        except Exception as error:  # from __post_init__
            return repr(error)
    return ""


def command_problems(words, root, monkeypatch):
    """What is wrong with a command that starts a Python file of the repository."""
    if words and words[0].startswith("-"):
        return [f"`{shlex.join(words)}`: the line before it should end in a backslash"]
    if not words or words[0] not in ("python", "python3", "torchrun"):
        return []
    if "-m" in words[:3] and words[0] != "torchrun":
        return []
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        return []
    path, shown = root / words[at], shlex.join(words)
    if not path.exists():
        return [f"`{shown}`: there is no {words[at]}"]
    if path not in scripts(root):
        return []
    counts = re.findall(r"--(?:nproc[-_]per[-_]node|nnodes)[= ](\d+)", " ".join(words[:at]))
    world_size = 1
    for count in counts:
        world_size *= int(count)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))  # Args may check divisibility by it
    error = parse_error(path, words[at + 1 :])
    return [f"`{shown}`: {error}"] if error else []


# Pages and links --------------------------------------------------------------------------------------------


def headings(text):
    """(level, title) of each heading."""
    return [(len(m[1]), m[2]) for m in re.finditer(r"^(#+) (.*?)[ #]*$", prose(text), re.MULTILINE)]


def page_problems(page):
    titles = [title for level, title in headings(page.read_text()) if level == 2]
    problems = [] if titles == HEADINGS else [f"{page.name}: headings are {titles}"]
    for name in ("flags", "metrics"):
        if between(page.read_text(), name) is None:
            problems.append(f"{page.name}: no <!-- {name}:begin --> and <!-- {name}:end -->")
    return problems


def anchors(text):
    """The anchors that a renderer gives the headings, and those set by hand."""
    found = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for _, title in headings(text):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = base = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        count = 0
        while slug in found:
            count += 1
            slug = f"{base}-{count}"
        found.add(slug)
    return found


def link_problems(document, root):
    """Links and images that lead to no file or heading of the repository."""
    text = re.sub(r"`[^`\n]*`", "", prose(document.read_text()))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    targets += re.findall(r"(?:src|srcset|href)=\"([^\"\s]+)", text)
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    problems = []
    for target in targets:
        if re.match(r"[a-z]+:", target):  # https:, mailto:
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists() or not path.is_relative_to(root):
            problems.append(f"{document.name}: {target} is not in the repository")
        elif anchor and path.suffix == ".md" and anchor not in anchors(path.read_text()):
            problems.append(f"{document.name}: {target} has no such heading")
    return problems


# Results ----------------------------------------------------------------------------------------------------

SPREAD = re.compile(r"\d\s*(?:±|\+/?-)\s*\d")


def result_problems(document, root):
    """Marked numbers that are not the measured ones, and means with a spread that carry no marker."""
    problems = []
    text = re.sub(r"`<!--.*?-->`", "", prose(document.read_text()))  # a marker that is only shown
    for i, line in enumerate(text.splitlines(), 1):
        where, start = f"{document.name}, line {i}", 0
        for marker in MARKER.finditer(line):
            before = re.split(r"(?<!\\)\|", line[start : marker.start()])[
                -1
            ]  # back to the last marker, in this cell
            before, start = before.replace("+/-", "±").replace("+-", "±"), marker.end()
            keys, printed = marker[2].split(","), list(NUMBER.finditer(before))
            if len(printed) < len(keys) or len(before) - printed[-1].end() > 24:
                problems.append(f"{where}: {len(keys)} numbers should stand right before {marker[0]}")
                continue
            for key, number in zip(keys, printed[-len(keys) :], strict=True):
                try:
                    value = measured(marker[1], key, root)
                except (OSError, KeyError, ValueError) as error:
                    problems.append(f"{where}: {marker[1]}#{key}: {error!r}")
                    continue
                if not agrees(number[0], value):
                    problems.append(f"{where}: {number[0]} is printed, {marker[1]}#{key} gives {value}")
        for spread in SPREAD.finditer(line):
            if not MARKER.search(line[spread.end() :].split("|")[0]):
                problems.append(f"{where}: `{spread[0]}` is a result without a `<!-- result: ... -->`")
    return problems


def readme_problems(root):
    """The README's script table against the files on disk."""
    text = (root / "README.md").read_text()
    rows, on_disk = script_rows(text), {path.name for path in scripts(root)}
    if not rows:
        return ["no script table between <!-- scripts:begin --> and <!-- scripts:end -->"]
    listed = [row["file"] for row in rows]
    problems = [f"{name} is not in the table" for name in sorted(on_disk - set(listed))]
    for row in rows:
        name = row["file"]
        if not name or not (root / name).exists():
            problems.append(f"{name or row} is not on disk")
        if listed.count(name) > 1:
            problems.append(f"{name} has more than one row")
        if name in on_disk and row.get("status", "").strip("*_") not in STATUSES:
            problems.append(f"{name}: the status is {row.get('status')!r}, not one of {sorted(STATUSES)}")
        if re.search(r"\d", re.sub(r"<!--.*?-->|\]\([^)]*\)", "", row.get("result", ""))):
            if not MARKER.search(row["result"]):
                problems.append(f"{name}: the result has no `<!-- result: ... -->`")
        if name in on_disk and not page_of(root / name).exists():
            problems.append(f"{name} has no docs page")
    return problems


# The repository ---------------------------------------------------------------------------------------------


def by_name(path):
    return str(path.relative_to(ROOT))


needs_readme = pytest.mark.skipif(not README.exists(), reason="no README yet")


def test_hacking_is_shown_told_and_stopped_as_the_page_of_ppo_says():
    result = json.loads((ROOT / "benchmarks" / "results" / "hacking.json").read_text())
    told = {
        guard: [any("hacked" in w for w in one["warnings"]) for one in runs]
        for guard, runs in result["runs"].items()
    }
    assert told == {"off": [True] * 3, "kl": [False] * 3, "max_kl": [False] * 3}
    assert [one["steps"] for one in result["runs"]["max_kl"]] == [4] * 3
    moved = {
        (guard, key): both["last"]["mean"] - both["first"]["mean"]
        for guard, keys in result["summary"].items()
        for key, both in keys.items()
    }
    assert moved["off", "objective/scores"] > 1 and moved["off", "gold_reward"] < -0.4
    assert moved["off", "completions/mean_length"] > 50
    for guard in ("kl", "max_kl"):
        assert moved[guard, "gold_reward"] > -0.02 and abs(moved[guard, "completions/mean_length"]) < 5


@needs_readme
def test_commands_of_learning_curves_measure_all_that_their_results_hold():
    found = [words for words in commands(README.read_text()) if "benchmarks/learning.py" in words]
    assert len(found) > 8
    for words in found:
        name = words[words.index("--name") + 1] if "--name" in words else words[2].removesuffix(".py")
        result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert set(words[words.index("--metrics") + 1 :]) == result["curves"].keys(), name


@needs_readme
def test_readme_lists_every_script_on_disk():
    assert not readme_problems(ROOT)


@needs_readme
def test_readmes_own_test_command_is_what_ci_runs():
    blocks = [code for language, code in fences(README.read_text()) if language in ("bash", "sh", "console")]
    lines = [
        line.strip().removeprefix("$ ") for code in blocks for line in code.splitlines() if "pytest" in line
    ]
    ci = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert [line for line in lines if line in ci], f"none of {lines} is a line of .ci/run"


def test_ci_stops_at_the_first_error():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK) and "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_page_has_the_fixed_headings(page):
    assert not page_problems(page)


def test_generated_parts_are_up_to_date():
    assert not outdated(), "run `python tests/sync_docs.py`"


@pytest.mark.parametrize("document", documents(), ids=by_name)
def test_documented_commands_parse(document, monkeypatch):
    problems = [
        p for words in commands(document.read_text()) for p in command_problems(words, ROOT, monkeypatch)
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_commands_in_a_scripts_docstring_parse(script, monkeypatch):
    text = re.sub(r"\\\n", " ", ast.get_docstring(ast.parse(script.read_text())) or "")
    lines = re.findall(r"^ *\$? *((?:[A-Z_]+=\S+ )*(?:python|torchrun) .*\.py\b.*)$", text, re.MULTILINE)
    problems = [p for ln in lines for w in command_lines(ln) for p in command_problems(w, ROOT, monkeypatch)]
    assert lines, "the docstring shows no command"
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("document", documents(), ids=by_name)
def test_local_links_and_images_resolve(document):
    assert not link_problems(document, ROOT)


@pytest.mark.parametrize("document", documents(), ids=by_name)
def test_result_numbers_are_the_measured_ones(document):
    assert not result_problems(document, ROOT)


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
"""


@pytest.fixture
def project(fake, tmp_path):
    """A repository of two scripts, with a README, a page and a result file that are right."""
    fake("a.py")
    fake("b.py")
    (tmp_path / "docs").mkdir()
    page = PAGE.format(headings="\n".join(f"## {title}\n" for title in HEADINGS))
    (tmp_path / "docs" / "a.md").write_text(page)
    (tmp_path / "docs" / "b.md").write_text(page)
    marker = "<!-- result: benchmarks/results/r.json#acc.mean * 100 -->"
    row = f"| [`{{0}}.py`](docs/{{0}}.md) | {{1}} | 62.4% {marker} | runs |\n"
    table = (
        "| Script | Lines | Result | Status |\n|---|---|---|---|\n" + row.format("a", 0) + row.format("b", 0)
    )
    (tmp_path / "README.md").write_text(
        f"# P\n\n<!-- scripts:begin -->\n{table}<!-- scripts:end -->\n\n## Second part\n"
    )
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    result = {
        "acc": {"mean": 0.62449, "std": 0.0081},
        "eval/loss": [1.5, 2e-6],
        "speed": 1245.2,
        "v1.5": 3,
        "ok": True,
    }
    (tmp_path / "benchmarks" / "results" / "r.json").write_text(json.dumps(result))
    for path, text in outdated(tmp_path).items():
        path.write_text(text)
    return tmp_path


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return path


def test_numbers_before_markers_are_written_anew_to_the_same_digits(project):
    marker = "<!-- result: benchmarks/results/r.json#{} -->"
    text = f"| v2 | 0.50 ± 0.1 {marker.format('acc.mean, acc.std')} | 9,999 {marker.format('speed')}\n"
    text += f"2 of 0.6 {marker.format('acc.mean')} and 70 % {marker.format('acc.mean * 100')}\n"
    wanted = f"| v2 | 0.62 ± 0.0 {marker.format('acc.mean, acc.std')} | 1,245 {marker.format('speed')}\n"
    wanted += f"2 of 0.6 {marker.format('acc.mean')} and 62 % {marker.format('acc.mean * 100')}\n"
    assert with_results(text, project) == wanted and with_results(wanted, project) == wanted


def test_flag_table_is_generated_from_the_dataclass(project, fake):
    table = flag_table(project / "a.py")
    assert "| `--num-steps` | `int` | `4` | Number of steps. |" in table
    assert "| `--verbose`, `--no-verbose` | `bool` | `False` | Print the loss. |" in table
    assert "half" not in table and table in (project / "docs" / "a.md").read_text()
    edits = (
        ("rate: float = 0.1", 'rate: Literal["x", "y"] = "x"'),
        ("int = 4", "tuple[str, ...] | None = field(default_factory=list)"),
    )
    table = flag_table(fake("c.py", *edits))
    assert "| `--rate` | `x, y` | `x` |" in table and r"| `tuple[str, ...] \| None` | `list()` |" in table


def test_outdated_tables_are_found_and_mended(project):
    lines = len((project / "a.py").read_text().splitlines())
    assert not outdated(project) and f"| {lines} |" in (project / "README.md").read_text()
    edit(project / "a.py", "    x = 0.0", "    x = 0.0\n    del x\n    x = 0.0")
    assert list(outdated(project)) == [project / "README.md"]
    assert f"| {lines + 2} |" in outdated(project)[project / "README.md"]
    edit(project / "b.py", "Number of steps.", "Number of all steps.")
    assert set(outdated(project)) == {project / "README.md", project / "docs" / "b.md"}


def test_documented_metrics_are_compared_with_the_logged_ones(project):
    a, logged = project / "a.py", {"loss", "eval/loss", "eval/perplexity", "rewards/math/mean"}
    names = logged - {"rewards/math/mean"} | {"rewards/<name>/mean"}
    assert documented_metrics(a, conditional=False) == names
    assert documented_metrics(a) == names | {"peak_memory_gb"}
    assert not metric_differences(a, logged) and not metric_differences(a, logged | {"peak_memory_gb"})
    assert metric_differences(a, logged - {"loss"}) == ["loss is not logged"]
    assert metric_differences(a, logged | {"kl"}) == ["kl is not documented"]
    assert metric_differences(a, logged - {"rewards/math/mean"}) == ["rewards/<name>/mean is not logged"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[`b.py`](docs/b.md)", "`c.py`"),
        ("[`b.py`](docs/b.md)", "`a.py`"),
        ("| runs |", "| works |"),
        ("% <!-- result: benchmarks/results/r.json#acc.mean * 100 -->", "%"),
        ("scripts:begin", "script:begin"),
    ],
)
def test_wrong_script_table_is_found(project, old, new):
    assert not readme_problems(project)
    edit(project / "README.md", old, new)
    assert readme_problems(project)


def test_script_without_row_or_page_is_found(project, fake):
    (project / "docs" / "b.md").unlink()
    fake("c.py")
    assert readme_problems(project) == ["c.py is not in the table", "b.py has no docs page"]


@pytest.mark.parametrize(
    ("old", "new"), [("## Usage", "## Use"), ("## Results", "### Results"), ("flags:end", "flag:end")]
)
def test_wrong_headings_are_found(project, old, new):
    assert not page_problems(project / "docs" / "a.md")
    assert page_problems(edit(project / "docs" / "a.md", old, new))


@pytest.mark.parametrize(
    ("command", "right"),
    [
        ("python a.py", True),
        ("$ OMP_NUM_THREADS=2 python a.py --rate 0.5 \\\n    --num-steps 3 --verbose  # a minute", True),
        ("torchrun --nproc-per-node 2 a.py --rate 0.5 > log && python b.py", True),
        ("python -m pytest && pip install x.py", True),
        ("python docs/../a.py --rate=1", True),
        ("python a.py --speed 0.5", False),
        ("python a.py --rate fast", False),
        ("python a.py --rate -1", False),
        ("python a.py ...", False),
        ("python c.py", False),
        ("python a.py\n    --rate 0.5", False),
        ("torchrun --nproc-per-node 2 a.py && python b.py --half 2", False),
        ("python tests/none.py", False),
    ],
)
def test_command_that_does_not_parse_is_found(project, monkeypatch, command, right):
    found = commands(f"Text\n\n```bash\n{command}\n```\n\n```text\npython a.py --bad\n```\n")
    problems = [p for words in found for p in command_problems(words, project, monkeypatch)]
    assert found and (not problems) == right, problems


@pytest.mark.parametrize(
    ("link", "right"),
    [
        ('[a](a.py) and [b](<docs/a.md#logged-metrics> "t") and [c](#second-part)', True),
        ('[a](https://example.org/x) `[b](none.md)` <img src="docs/a.md">', True),
        ("[a](none.md)", False),
        ("![figure](docs/img/curve.png)", False),
        ("[a](docs/a.md#metrics)", False),
        ("[a](#third-part)", False),
        ('<img width="3" src="docs/none.png">', False),
        ("[a][1]\n\n[1]: none.md", False),
        ("[a](../../)", False),
    ],
)
def test_broken_link_is_found(project, link, right):
    readme = project / "README.md"
    readme.write_text(readme.read_text() + link)
    assert (not link_problems(readme, project)) == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("It is 0.62 @acc.mean@ and 0.624 @acc.mean@.", True),
        ("| 12 | **62.4** ± 0.8% @acc.mean * 100, acc.std * 100@ | 13 |", True),
        ("62.4 @acc.mean * 100@ ± 0.8 @acc.std * 100@", True),
        ("1,245 tokens/s @speed@, 20.8 minutes @speed / 60@, 2e-6 @eval/loss.1@, 3 @v1.5@", True),
        ("GSM8K has 62 problems, or 63; no result here", True),
        ("0.63 @acc.mean@", False),
        ("0.625 @acc.mean@", False),
        ("| 0.62 | @acc.mean@ |", False),
        ("0.62 of something that ends far before @acc.mean@", False),
        ("0.62 @acc.median@", False),
        ("1 @ok@", False),
        ("0.62 @acc@", False),
        ("-0.62 @acc.mean@", False),
        ("62.4 ± 0.9 @acc.mean * 100,acc.std * 100@", False),
        ("Write `@acc.mean@` after a number.", True),
        ("62.4 ± 0.8", False),
        ("62.4 +- 0.8 | 1 @ok@", False),
    ],
)
def test_wrong_result_is_found(project, text, right):
    document = project / "docs" / "x.md"
    document.write_text(re.sub(r"@(.*?)@", r"<!-- result: benchmarks/results/r.json#\1 -->", text))
    assert (not result_problems(document, project)) == right


def test_result_outside_the_results_folder_is_found(project):
    (project / "r.json").write_text("[1]")
    document = project / "docs" / "x.md"
    for place in ("r.json", "benchmarks/results/none.json"):
        document.write_text(f"1 <!-- result: {place}#0 -->")
        assert result_problems(document, project)
