"""What benchmarks/faults.py does to files: damaged checkpoints, models and JSONL; junk rows."""

import contextlib
import gzip
import importlib
import io
import json
import shutil
import sys
from pathlib import Path

from faults_runs import Args, command, counted, equal_share, go_on, outcome, run, told
from learning import ROOT

LOADERS = {  # script: its loader, data of tiny/, flags
    "sft": ("load_sequences", "sft_train", {}),
    "dpo": ("load_pairs", "preference_train", {}),
    "ipo_kto_simpo_orpo": ("load_labelled", "unpaired_train", {"algorithm": "kto"}),
    "grpo": ("load_prompts", "prompts_train", {}),
    "process_reward_model": ("load_steps", "steps_train", {}),
    "reward_model": ("load_answers", "preference_train", {}),
}
NAMES = (
    "prompt completion chosen rejected label labels completions messages question answer text role content"
)
NAMES += " conversations from value instruction input output tools tool_calls chat_template_kwargs"
GOOD, SIZE = 200, 2000  # good rows that stand before each batch of junk
FILES = 200  # rows that are read from a file of their own


def attempt(function, *arguments) -> tuple:
    """What a call returns, and how it failed: the user's line, or an exception's name; "" if it did not."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            return function(*arguments), ""
    except SystemExit:
        return None, told(errors.getvalue())
    except Exception as error:
        return None, f"a traceback: {type(error).__name__}: {error}".partition("\n")[0]


def damaged(path: Path, bits: int = 1):
    """Spoil a file in turn: cut it in half, empty it, turn one of `bits` bits all over it, remove it."""
    content = bytearray(path.read_bytes())
    spoilt = {"cut": content[: len(content) // 2], "emptied": b""}
    for n in range(1, bits + 1):
        at = n * len(content) // (bits + 1) | 3  # of a number in float32 the sign and the exponent
        spoilt[f"bit {n} turned"] = content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :]
    for how, new in spoilt.items():
        path.write_bytes(new)
        yield how
    path.unlink()
    yield "removed"


def corrupt_checkpoint(args: Args) -> dict:
    """The last checkpoint of a run that ended two steps early is damaged; it goes on to its end."""
    whole, broken, folder = (args.folder / "sft" / name for name in ("constant", "broken_off", "damaged"))
    for made, steps in ((whole, 8), (broken, 6)):
        shutil.rmtree(made, ignore_errors=True)
        code, said = run(command("sft", args, made, "--lr-schedule", "constant", "--max-steps", steps), args)
        assert code == 0, said
    found, wanted, last = [], outcome(whole), Path("checkpoints") / "step_00000006"
    for name, bits in (("__0_0.distcp", 7), (".metadata", 1)):
        copy = args.folder / "copy"
        shutil.copy(broken / last / name, copy)
        for how in damaged(copy, bits):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(broken, folder)
            shutil.rmtree(folder / "model")
            spoilt = folder / last / name
            shutil.copy(copy, spoilt) if copy.exists() else spoilt.unlink()
            went, said = go_on(command("sft", args, folder, "--lr-schedule", "constant"), folder, args)
            line = {"file": name, "how": how, "went": went, "fell_back": "trying the one before" in said}
            found.append(line | {"equal": outcome(folder) == wanted})
            print("corrupt_checkpoint", found[-1], flush=True)
    noticed = [x for x in found if x["fell_back"]]
    ended = [x for x in found if not x["fell_back"] and x["went"] != "continued"]
    unseen = [x for x in found if x not in noticed + ended]
    return {
        "fault": "damaged last checkpoint (`sft.py`), two steps before the end",
        "times": f"{len(found)}: data or index cut, emptied, one bit turned, removed",
        "seen": f"{len(noticed)} x `... is damaged, trying the one before`; {len(unseen)} x nothing; "
        + (counted(x["went"] for x in ended) or "0 x else"),
        "lost": "the steps since the checkpoint before, where it is noticed",
        "verdict": f"noticed: {equal_share(noticed)}; not noticed, turned bits: {equal_share(unseen)}",
        "each": found,
    }


def corrupt_model(args: Args) -> dict:
    """--model is a folder of which one file is damaged."""
    found, model, folder = [], args.folder / "broken_model", args.folder / "of_broken"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(ROOT / "tiny" / "sft", model)
        for how in damaged(model / name):
            shutil.rmtree(folder, ignore_errors=True)
            code, said = run(command("sft", args, folder, "--model", model), args)
            found.append({"file": name, "how": how, "code": code, "told": told(said)})
            print("corrupt_model", found[-1], flush=True)
    in_a_line, traceback = ([x for x in found if x["code"] == code] for code in (2, 1))
    return {
        "fault": "damaged `model.safetensors`, `config.json` or `tokenizer.json`",
        "times": f"{len(found)}: cut, emptied, one bit turned, removed",
        "seen": f"{len(in_a_line)} x one line; {len(traceback)} x a traceback; "
        f"{len(found) - len(in_a_line + traceback)} x nothing",
        "lost": "nothing: no run has begun",
        "verdict": "all refused"
        if all(x["code"] for x in found)
        else "a turned bit of a weight is not noticed",
        "each": found,
    }


def broken_jsonl(args: Args) -> dict:
    """Files of tiny/'s rows with damage of every kind, read by the function that all scripts share."""
    sys.path.insert(0, str(ROOT))
    sft, found = importlib.import_module("sft"), []
    lines = (ROOT / "tiny" / "data" / "preference_train.jsonl").read_bytes().splitlines(keepends=True)[:500]
    whole, row = b"".join(lines), json.loads(lines[250])
    with_row = lambda changed: b"".join([*lines[:250], json.dumps(changed).encode() + b"\n", *lines[251:]])
    middle = len(b"".join(lines[:250])) + 40
    files = {
        "cut in the middle of a line": whole[: -len(lines[-1]) // 2],
        "a line that is no JSON": b"".join([*lines[:250], b"<html>\n", *lines[250:]]),
        "a line cut off": b"".join([*lines[:250], lines[250][:40] + b"\n", *lines[251:]]),
        "4,096 zero bytes": whole[:middle] + bytes(4096) + whole[middle:],
        "bytes that are no UTF-8": whole[:middle] + b"\xff\xfe" + whole[middle:],
        "empty": b"",
        "a gzip file cut in half": gzip.compress(whole)[: len(gzip.compress(whole)) // 2],
        "another type in one row": with_row(row | {"prompt": 7}),
        "null in one row": with_row(row | {"chosen": None}),
        "a column more in one row": with_row(row | {"source": {"page": 7}}),
        "Windows line ends": whole.replace(b"\n", b"\r\n"),
        "empty lines": b"\n\n".join(lines),
    }
    for name, content in files.items():
        path = args.folder / f"broken.jsonl{'.gz' * ('gzip' in name)}"
        path.write_bytes(content)
        rows, error = attempt(sft.load_rows, str(path), "train", sft.Args())
        found.append({"file": name, "rows": None if rows is None else len(rows), "told": error})
        print("corrupt_jsonl", found[-1], flush=True)
    refused = [x for x in found if x["told"] and "traceback" not in x["told"]]
    read = [x for x in found if x["rows"] is not None]
    return {
        "fault": "damaged JSONL (the loader of all scripts)",
        "times": f"{len(found)}: cut, garbage, zeros, no UTF-8, other types, null, ...",
        "seen": f"{len(refused)} x one line, {len(read)} x read, {len(found) - len(refused + read)} x else",
        "lost": f"{sum(500 - x['rows'] for x in read)} rows of files that are read" if read else "nothing",
        "verdict": "no row is lost in silence"
        if all(x["rows"] in (None, 500) for x in found)
        else "see below",
        "each": found,
    }


def make_junk(good: list[dict], count: int) -> list[dict]:
    """Rows of nonsense under familiar names, and good rows with nonsense in one column; always the same."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    names, found = st.sampled_from(NAMES.split()), []
    texts = st.text(max_size=8) | st.sampled_from(
        ["", " ", "\n\nHuman: a", "<|im_end|>", "\0", "\ud800", "9" * 5000]
    )
    plain = st.none() | st.booleans() | st.integers() | st.floats() | texts
    within = lambda x: st.lists(x, max_size=3) | st.dictionaries(names | texts, x, max_size=3)
    values = st.recursive(plain, within, max_leaves=6)
    roles = st.sampled_from(["user", "assistant", "system", "tool"]) | values
    turns = st.lists(st.fixed_dictionaries({"role": roles, "content": texts | values}), max_size=4)
    spoilt = st.builds(
        lambda row, at, value: row | {[*row][at % len(row)]: value},
        st.sampled_from(good),
        st.integers(0, 9),
        values | turns,
    )
    how = {"max_examples": count, "derandomize": True, "database": None, "deadline": None}

    @settings(**how, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(names, values | turns, max_size=5) | spoilt)
    def collect(row):
        found.append(row)

    collect()
    return found[:count]


def junk_rows(args: Args) -> dict:
    """Junk beside good rows through every loader: none may stop it, and every good row must come out.

    Rows stand in memory, since Arrow refuses a file with a column of two types; the first of them go through
    the whole loader, each as a file of its own: it must be read, or refused with one line.
    """
    sys.path.insert(0, str(ROOT))
    each, path = [], args.folder / "junk.jsonl"
    for script, (name, source, flags) in LOADERS.items():
        module = importlib.import_module(script)
        settings, reader = module.Args(**flags), (module.load_rows, module.report_dropped)
        lines = (ROOT / "tiny" / "data" / f"{source}.jsonl").read_text().splitlines()
        good = list({line: json.loads(line) for line in lines}.values())[:GOOD]
        junk, tokenizer = make_junk(good, args.rows), module.load_tokenizer(settings)
        load = lambda where: attempt(getattr(module, name), tokenizer, str(where), "train", settings)  # noqa: B023
        told_of = []
        for row in junk[:FILES]:
            path.write_text(json.dumps(row) + "\n")
            told_of.append(load(path)[1])

        def load_rows(rows):
            module.load_rows, module.report_dropped = lambda *_: rows, lambda *_: None  # noqa: B023
            return load("rows.jsonl")  # noqa: B023

        wanted, crashes, lost, usable = set(map(key, load_rows(good)[0])), [], 0, 0
        for start in range(0, len(junk), SIZE):
            part = junk[start : start + SIZE]
            found, error = load_rows(good + part)
            if error:
                alone = [(row, load_rows([row])[1]) for row in part]
                some = [{"row": repr(row)[:200], "told": why} for row, why in alone if why]
                crashes += some or [{"row": "only together", "told": error}]
                continue
            keys = set(map(key, found))
            lost, usable = lost + len(wanted - keys), usable + len(keys - wanted)
        module.load_rows, module.report_dropped = reader
        crashes += [{"row": "a file", "told": why} for why in told_of if why.startswith("a traceback")]
        files = {"read": told_of.count(""), "one_line": sum("traceback" not in x for x in told_of if x)}
        line = {"loader": f"{script}.py: {name}", "rows": len(junk), "usable": usable, "good_lost": lost}
        each.append(line | {"files": files, "crashes": len(crashes), "first": crashes[:5]})
        print("junk_rows", each[-1], flush=True)
    crashes, usable = (sum(line[what] for line in each) for what in ("crashes", "usable"))
    read, refused = (sum(line["files"][what] for line in each) for what in ("read", "one_line"))
    return {
        "fault": f"junk rows (hypothesis) beside good ones, {len(each)} loaders",
        "times": f"{args.rows:,} a loader; {FILES} of them also as files",
        "seen": f"{usable:,} rows can be used all the same; files: {read} x read, {refused} x one line",
        "lost": f"{sum(line['good_lost'] for line in each)} good rows",
        "verdict": f"{crashes} rows stop a loader",
        "each": each,
    }


def key(example) -> str:
    """Token ids of whatever a loader makes: what is equal has equal ones."""
    if hasattr(example, "tolist"):
        return str(example.tolist())
    if isinstance(example, dict):
        return ""
    return str([key(part) for part in example]) if isinstance(example, list | tuple) else repr(example)
