"""A mistake in the flags ends a script with one line, before a model is loaded or anything is written.

A line of data/mistakes.jsonl has script, flags, and what the line must say, a regular expression.
"""

import importlib
import re

import pytest
from conftest import DATA, ROOT, read_lines
from helpers import error_of
from transformers import AutoModelForCausalLM

MISTAKES = read_lines(DATA / "mistakes.jsonl")


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda case: " ".join([case["script"], *case["flags"]]))
def test_mistake_is_one_line_before_a_model_is_loaded(
    mistake, random_model, tmp_path, monkeypatch, capsys, one_cpu
):
    def placed(value):
        if isinstance(value, list):
            return tuple(map(placed, value))
        names = {"RANDOM_MODEL": str(random_model), "TESTS": str(ROOT / "tests")}
        return re.sub("RANDOM_MODEL|TESTS", lambda m: names[m[0]], value) if isinstance(value, str) else value

    script = importlib.import_module(mistake["script"])
    for place, name in ((script, "load_model"), (AutoModelForCausalLM, "from_pretrained")):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("a model was loaded"), raising=False)
    flags = {name: placed(value) for name, value in mistake["flags"].items()}
    line = error_of(lambda: script.main(script.Args(**{"output_dir": str(tmp_path / "run")} | flags)), capsys)
    assert re.search(mistake["told"], line), line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
