"""Rewards: functions that read a completion and say what it is worth.

Every reward has TRL's signature: lists in, one number a completion out, None where a row cannot be scored.

    reward(prompts, completions, **columns) -> list[float | None]

Prompts and completions are texts, or lists of {"role", "content"} messages, of which the assistant's last one
counts. Each column of the dataset comes as a keyword list. Scripts load rewards by path, never by import, so
a file of your own does as well as this one, and so does a reward model, by its folder or hub id:

    --reward rewards.py:math_answer rewards.py:think_format runs/rm/model --reward-weights 1.0 0.2 0.5

    math_answer           1 if the final answer equals the gold one, however it is written
    math_answer_strict    the same, of answers in a format that was asked for
    code_tests            1 if the program passes its tests, run in a sandbox (sandbox.py)
    think_format          1 if the completion is <think>...</think> and then an answer
    json_format           1 if the completion is JSON
    length_penalty        from 0 to -1 with the length beyond a bound
    soft_overlong         from 0 to -1 over the last tokens before the limit (DAPO)
    repetition_penalty    minus the share of n-grams that repeat an earlier one

`reward_model` makes such a function of a reward model, and `final_answer` is what a majority votes on.
Keyword-only parameters are settings: functools.partial changes them, in a file of your own (docs/rewards.md).
Beside the standard library, formulas need math-verify, and reward models torch and transformers.
"""

import faulthandler
import functools
import importlib.util
import json
import os
import re
import sys
import threading
import traceback
import warnings
from pathlib import Path


@functools.cache
def module(name):
    """The module that stands beside this file under that name, whatever folders Python looks in."""
    path = Path(__file__).resolve().with_name(f"{name}.py")
    if str(path) not in sys.modules:  # one, with its workers, however often this file is loaded
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[str(path)] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[str(path)])
    return sys.modules[str(path)]


def within(seconds, spec, function):
    """The reward function, except that the process ends where no answer has come after `seconds`; 0: never.

    A thread ends the process as a kill would, with one line, whatever the function catches or waits for; if
    code in C keeps Python's lock, faulthandler does, 5 seconds later. --resume takes the last checkpoint.
    """

    def give_up(watched):
        calls = traceback.extract_stack(sys._current_frames()[watched])
        at = [call for call in calls if Path(call.filename).name == path.rpartition("/")[2]][-1:]
        where = "".join(f"; it is in line {call.lineno} of {call.filename}" for call in at)
        told = f"error: --reward {spec}: no answer in {seconds:g} s (--reward-timeout){where}"
        print(told, file=sys.stderr, flush=True)
        os._exit(2)

    @functools.wraps(function)
    def limited(**columns):
        timer = threading.Timer(seconds, give_up, [threading.get_ident()])
        timer.daemon = True
        timer.start()
        faulthandler.dump_traceback_later(seconds + 5, exit=True, file=2)  # to stderr
        try:
            return list(function(**columns))  # of a generator, too
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    path, seconds = spec.rpartition(":")[0], min(seconds, 1e8)  # three years: a timer has its limits, too
    return limited if seconds else function


# ------------------------------------------------------------------------------------------------------------
# Texts
# ------------------------------------------------------------------------------------------------------------
def text_of(completion) -> str | None:
    """The text of a completion: itself, or the content of the assistant's last message; None of another."""
    if isinstance(completion, list | tuple):
        turns = [turn for turn in completion if isinstance(turn, dict) and turn.get("role") == "assistant"]
        completion = (turns[-1].get("content") if turns else None) or ""
        if isinstance(completion, list):  # parts of a multimodal message
            completion = "".join(str(part.get("text", "")) for part in completion if isinstance(part, dict))
    return completion if isinstance(completion, str) else None


def each(score, completions, *columns) -> list:
    """`score` of each completion's text and its row's `columns`; None where a completion has no text."""
    rows = zip(map(text_of, completions), *columns, strict=True)
    return [None if text is None else score(text, *values) for text, *values in rows]


def after_thought(text) -> str:
    """What follows the last </think>; nothing where a thought was begun and never ended."""
    rest = text.rpartition("</think>")[2]
    return rest if "<think>" not in rest else ""


def last_fence(text, *languages) -> str:
    """The last fenced block, of one of `languages` if there is any; the whole text without a block."""
    blocks = re.findall(r"```([^\n`]*)\n(.*?)```", text, re.DOTALL)
    named = [code for language, code in blocks if language.strip().lower() in languages]
    return (named or [code for _, code in blocks] or [text])[-1]


# ------------------------------------------------------------------------------------------------------------
# Mathematics
# ------------------------------------------------------------------------------------------------------------
FORMATS = {  # what each mark looks like; all are found in time linear in the text
    "hash": r"^[^\n]*####([^\n]*)",  # GSM8K's #### 18
    "boxed": r"\\(?:boxed|fbox)\s*+\{",  # its end is where the braces balance
    "tag": r"<answer>((?:(?!</?answer>).)*)</answer>",
    "line": r"^[ \t*_]*+(?:A|(?i:(?:final )?answer))[ \t*_]*+:([^\n]*)",  # A: 18
    "says": r"(?i:\bthe (?:\w{1,20} )?answer is\b)((?:(?!\.(?:\s|$)| because\b| since\b|the answer)[^\n])*)",
}
OPTIONS = re.compile(r"^[ \t*_(]*+B[ \t*_]*+[:.)]", re.MULTILINE)  # beside which A: 18 is no answer
HEADING = re.compile(r"Step\b|\d+[.)] |.*:$|$")  # of Markdown: #### Step 1, #### 2. Add them, #### Answer:
# Words and signs beside a text's last number that make something else of it
BESIDE = (
    "not no or than between least most over under to times plus minus negative dozen squared cubed mod choose"
)
BESIDE = {
    *BESIDE.split(),
    *"halves thirds quarters fourths fifths tenths hundredths factorial + - * / x ^ < >".split(),
}


def math_answer(prompts, completions, answer, *, formats=tuple(FORMATS), last_number=True, **columns):
    r"""1.0 if a completion's final answer equals `answer`, else 0.0.

    `answer` is bare, or a solution with its answer marked (GSM8K). `formats` says which marks count in a
    completion, of `hash` (#### 18), `boxed` (\boxed{18}), `tag` (<answer>18</answer>), `line` (A: 18, or
    Answer: 18, on a line of its own) and `says` (the answer is 18); the last mark counts, after the thought
    if there is one. With `last_number` a completion without a mark answers with its last number. What is
    equal, mathematics.py says. None where the gold answer is empty. RuntimeError without math-verify.
    """

    def pair(text, gold):
        gold = "" if gold is None else str(gold).strip()
        return (marked_answer(gold) or gold, found_answer(text, formats, last_number) or "") if gold else None

    pairs = each(pair, completions, answer)
    verdicts = iter(module("mathematics").equal([pair for pair in pairs if pair]))
    return [float(next(verdicts)) if pair else None for pair in pairs]


# Answers without a mark that a prompt asks for are worth 0.0.
math_answer_strict = functools.partial(math_answer, formats=("hash", "boxed", "tag"), last_number=False)


def final_answer(completion) -> str:
    """The answer that `math_answer` finds in a completion, written so that equal answers are equal texts.

    Numbers are integers or fractions in lowest terms, without unit and percent sign; other marked answers are
    without spaces and what only typesets them, words in lower case. One without an answer is its own.
    """
    text = text_of(completion) or ""
    found = found_answer(text)
    if found is None:
        return text.strip()
    value, _ = module("mathematics").number(found)
    return module("mathematics").letters(found) if value is None else str(value)


def found_answer(text, formats=tuple(FORMATS), last_number=True) -> str | None:
    """What the last mark after the thought gives ; without a mark, if wanted, the last number."""
    text = after_thought(text)
    found = marked_answer(text, formats)
    if found is None and last_number and not OPTIONS.search(text):
        return final_number(text)
    return found


def marked_answer(text, formats=tuple(FORMATS)) -> str | None:
    """What the last mark in a text gives for its answer, or None; a box within another mark is opened."""
    marks, options = boxes(text) if "boxed" in formats else [], OPTIONS.search(text)
    for name in {*formats} - {"boxed"}:
        for match in re.finditer(FORMATS[name], text, re.MULTILINE | re.DOTALL):
            one_of_many = (
                options and name == "line" and "nswer" not in match[0][: match.start(1) - match.start()]
            )
            answer = match[1].strip().lstrip(":*_ \t").rstrip("*_, \t")
            if not one_of_many and not HEADING.match(answer):
                marks.append((match.start(1), answer))
    found = max(marks)[1] if marks else None
    if found and r"\boxed" in found and "boxed" not in formats:
        return marked_answer(found, ("boxed",))
    return found


def boxes(text, longest=1000) -> list[tuple[int, str]]:
    r"""Where closed boxes begin and what they hold; with the one before, if `or` or a comma is between."""
    found, opened, end, answer = [], [], 0, ""
    for match in re.finditer(rf"{FORMATS['boxed']}|\\.|[{{}}]", text, re.DOTALL):
        if match[0] != "}":
            opened += [match] * (match[0][-1] == "{" and match[0] != r"\{")
        elif opened and len((box := opened.pop())[0]) > 1 and match.start() - box.end() <= longest:
            between = re.fullmatch(r"[\s$]*,?[\s$]*(?:or|and|,)[\s$]*", text[end : box.start()][:20])
            joined = f"{answer}, " if end and between and len(answer) <= longest else ""
            answer, end = joined + text[box.end() : match.start()].strip(), match.end()
            found.append((box.end(), answer))
    return found


def final_number(text) -> str | None:
    """The last number in a text, with what belongs to it; None where it is part of something else."""
    last = max(map(text.rfind, "0123456789"))
    words = module("mathematics").plain(text[max(0, last - 200) : last + 40]).split() if last >= 0 else []
    at = max((n for n, word in enumerate(words) if re.search(r"\d", word)), default=None)
    if at is None:
        return None
    before, word, *behind = words[:at], *(word.strip("()*_\"'`.,;:!?#") for word in words[at:])
    if before and before[-1].isdecimal() and "/" in word:
        word = f"{before.pop()} {word}"  # 1 1/2
    if behind and behind[0] in ("%", "percent", "hundred", "thousand", "million", "billion"):
        word = f"{word} {behind.pop(0)}"
    beside = {*before[-1:], *behind[:1], *({"between"} & {*before[-3:]})}
    return word if module("mathematics").number(word)[0] is not None and not beside & BESIDE else None


# ------------------------------------------------------------------------------------------------------------
# Format, length and repetition
# ------------------------------------------------------------------------------------------------------------
def think_format(prompts, completions, **columns):
    """1.0 if a completion is one <think>...</think>, not empty, and then an answer, else 0.0.

    Some chat templates open the thought in the prompt. A text shows it by its end; messages do not, and so a
    completion of theirs may lack the opening tag.
    """

    def score(text, prompt):
        in_prompt = prompt.rstrip().endswith("<think>") if isinstance(prompt, str) else "<think>" not in text
        text = "<think>" * in_prompt + text
        before, _, rest = text.partition("<think>")
        thought, _, answer = rest.partition("</think>")
        once = text.count("<think>") == text.count("</think>") == 1
        return float(bool(once and not before.strip() and thought.strip() and answer.strip()))

    return each(score, completions, prompts)


def json_format(prompts, completions, **columns):
    """1.0 if a completion, or its last fenced block, is JSON (RFC 8259: no NaN, no Infinity), else 0.0."""

    def score(text):
        try:  # int refuses the texts NaN and Infinity; len takes a number of any length
            json.loads(last_fence(after_thought(text), "json"), parse_constant=int, parse_int=len)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0

    return each(score, completions)


def length_penalty(prompts, completions, completion_ids=None, *, max_length=256, **columns):
    """0 up to `max_length` tokens, words without `completion_ids`; then down to -1 at twice that length."""
    score = lambda units: min(max(1 - len(units) / max_length, -1.0), 0.0)
    return each_length(score, completions, completion_ids)


def soft_overlong(
    prompts, completions, completion_ids=None, *, max_completion_length=20480, cache=None, **columns
):
    """0 up to max_completion_length - cache tokens, then linearly down to -1 (Eq. 13, arXiv:2503.14476).

    Scripts set `max_completion_length` to their flag. By default `cache` is a fifth of it, as in DAPO, whose
    lengths are 20,480 and 4,096. ValueError without `completion_ids`.
    """
    if completion_ids is None:
        raise ValueError("soft_overlong counts tokens and needs completion_ids")
    cache = max_completion_length // 5 if cache is None else cache

    def score(ids):
        if len(ids) > max_completion_length:
            return -1.0
        return min((max_completion_length - cache - len(ids)) / cache, 0.0) if cache else 0.0

    return each_length(score, completions, completion_ids)


def repetition_penalty(prompts, completions, completion_ids=None, *, n=3, scale=1.0, **columns):
    """-scale times the share of n-grams that occurred before in the completion (Sec. 2.4, arXiv:2502.03373).

    N-grams are of tokens where `completion_ids` are given, else of words in lower case; fewer than n give 0.
    """

    def score(units):
        ngrams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
        return scale * (len(set(ngrams)) / len(ngrams) - 1) if ngrams else 0.0

    return each_length(score, completions, completion_ids)


def each_length(score, completions, completion_ids) -> list:
    """`score` of each completion's token ids, where they are given, else of its words in lower case."""
    if completion_ids is None:
        return each(lambda text: score(text.lower().split()), completions)
    return [None if ids is None else score(ids) for ids in completion_ids]


# ------------------------------------------------------------------------------------------------------------
# Reward models
# ------------------------------------------------------------------------------------------------------------
AGGREGATES = {  # rewards of an ensemble (members, B) -> (B,), after arXiv:2310.02743 (with variances there)
    "mean": lambda scores: scores.mean(0),
    "min": lambda scores: scores.amin(0),
    "mean_minus_std": lambda scores: scores.mean(0) - scores.std(0, unbiased=False),
}


def reward_model(path, device="cpu", dtype="float32", max_tokens=2**12):
    """A reward function that asks a reward model: a folder or hub id of a decoder with one output.

    The model reads conversations with its own tokenizer and chat template; its reward is that at the last
    token. An ensemble (a folder with ensemble.json) gives the mean of its members; with `:min` or
    `:mean_minus_std` behind the folder it distrusts answers on which they differ. Backbones compute in
    `dtype`, heads in float32; `max_tokens` bounds a batch. Rows that the template refuses, or that are longer
    than the model's positions, get None. ValueError if it is no reward model: no random head ever scores.
    """
    import torch

    folder, _, how = str(path).rpartition(":")
    if how not in AGGREGATES:
        folder, how = str(path), "mean"
    members = [load_classifier(member, device, dtype) for member in ensemble_members(folder)]

    def score(prompts, completions, truncated=None, tools=None, chat_template_kwargs=None, **columns):
        optional = [column or [None] * len(prompts) for column in (truncated, tools, chat_template_kwargs)]
        rows = list(zip(prompts, completions, *optional, strict=True))
        scores = torch.stack([classifier_scores(*member, rows, max_tokens) for member in members])
        together = AGGREGATES[how](scores).tolist()  # (members, B) -> (B,)
        return [None if reward != reward else reward for reward in together]  # NaN is not itself

    return score


def ensemble_members(name) -> list[str]:
    """The folders of an ensemble's members; of another folder or hub id itself."""
    folder, beside = Path(name), Path(__file__).resolve().parent / name
    if not folder.exists() and beside.exists():  # tiny/reward is found from any folder
        folder = beside
    index = folder / "ensemble.json"
    members = json.loads(index.read_text())["members"] if index.exists() else []
    return [str(folder / member) for member in members] or [str(folder)]


def load_classifier(path, device, dtype) -> tuple:
    """The frozen model and the tokenizer of a reward model; ValueError if it is none."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    if not os.path.isdir(path) and (os.path.isabs(path) or path.count("/") > 1):  # no hub id
        raise ValueError(f"{path}: no such folder")
    config = AutoConfig.from_pretrained(path)
    kinds = ", ".join(config.architectures or ["nothing known"])
    if "ForSequenceClassification" not in kinds or config.num_labels != 1:
        raise ValueError(f"{path} is no reward model, but {kinds} with {config.num_labels} outputs")
    options = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    model, loaded = AutoModelForSequenceClassification.from_pretrained(path, **options)
    if loaded["missing_keys"] or not hasattr(model, "score"):
        raise ValueError(f"{path} is no reward model: it lacks {sorted(loaded['missing_keys']) or 'a score'}")
    model.score.float()  # rewards differ by less than bfloat16 tells apart
    return model.eval().requires_grad_(False).to(device), AutoTokenizer.from_pretrained(path)


def classifier_scores(model, tokenizer, rows, max_tokens):
    """Rewards (B,), float32 on the CPU, of rows as `conversation_ids` takes them; NaN where it cannot be."""
    import torch

    if tokenizer.chat_template is None and any(isinstance(prompt, list) for prompt, *_ in rows):
        raise ValueError("prompts are messages, and the reward model's tokenizer has no chat template")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    tokens = {}
    for i, row in enumerate(rows):
        try:
            tokens[i] = conversation_ids(tokenizer, *row)
        except Exception as error:  # templates raise what they like
            warnings.warn(f"a row that the reward model's template refuses: {error}", stacklevel=2)
    scores = torch.full((len(rows),), torch.nan)  # (B,)
    order = sorted((i for i in tokens if 0 < len(tokens[i]) <= limit), key=lambda i: -len(tokens[i]))
    while order:
        size = max(1, max_tokens // len(tokens[order[0]]))
        batch, order = order[:size], order[size:]  # of like lengths, the longest first
        longest = len(tokens[batch[0]])
        padded = [tokens[i] + [0] * (longest - len(tokens[i])) for i in batch]
        input_ids = torch.tensor(padded, device=model.device)  # (b, L): what stands behind an end is not seen
        states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (b, L, H)
        last = states[range(len(batch)), [len(tokens[i]) - 1 for i in batch]].float()  # (b, H)
        scores[batch] = model.score(last).squeeze(1).cpu() + getattr(model.config, "reward_offset", 0.0)
    return scores


def conversation_ids(tokenizer, prompt, completion, truncated, tools, chat_template_kwargs) -> list[int]:
    """A prompt and a completion, texts or messages, as tokens up to the end token, if it is not truncated."""
    text, end = text_of(completion), tokenizer.eos_token_id
    if isinstance(prompt, str):
        bos = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
        head, reply = bos + prompt.removeprefix(bos), text
    else:
        said = [{"role": "assistant", "content": text}] if isinstance(completion, str) else completion
        options = {"tokenize": False, "tools": tools, **(chat_template_kwargs or {})}
        head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(prompt + said, **options).rstrip()
        reply = whole[len(head) :] if whole.startswith(head) and not truncated else text
    head_ids, reply_ids, ids = tokenizer([head, reply, head + reply], add_special_tokens=False).input_ids
    if ids[: len(head_ids)] != head_ids:  # a token reaches across the border
        ids = head_ids + reply_ids
    no_end = not truncated and end is not None and (not ids or ids[-1] not in tokenizer.added_tokens_decoder)
    return ids + [end] * no_end


# ------------------------------------------------------------------------------------------------------------
# Programs
# ------------------------------------------------------------------------------------------------------------
def code_tests(
    prompts,
    completions,
    tests,
    entry_point=None,
    *,
    allow_code_execution=False,
    timeout=10.0,
    memory_mb=1024,
    workers=None,
    **columns,
):
    """1.0 if the program in a completion passes its tests, else 0.0; None if these are not understood.

    `tests` is Python source, a list of its lines, or inputs and outputs (docs/rewards.md: which forms). Each
    program has `timeout` seconds and `memory_mb`; `workers` (the number of CPUs) run at once. RuntimeError
    unless `allow_code_execution=True`, and where the sandbox cannot be built.
    """
    if allow_code_execution is not True:  # a dataset's column of this name is a list
        problem = "code_tests runs on this machine what the model wrote; if that is what you want, pass "
        raise RuntimeError(problem + "--allow-code-execution, or here allow_code_execution=True")

    def job(text, given, name):
        try:
            return program_of(text, given, name), *tests_of(given, name)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            return warnings.warn(f"code_tests cannot read {given!r:.80}: {error!r}", stacklevel=2)

    jobs = each(job, completions, tests, entry_point or [None] * len(tests))
    verdicts = iter(module("sandbox").run_batch(list(filter(None, jobs)), timeout, memory_mb, workers))
    scores = [next(verdicts)[0] if job else None for job in jobs]
    return [None if passed is None else float(passed) for passed in scores]


def tests_of(tests, entry_point) -> tuple:
    """Tests as `sandbox.run_batch` takes them, and the function that they call; an error of other forms."""
    if isinstance(tests, str) and tests.lstrip().startswith(("{", "[")):
        tests = json.loads(tests)
    if isinstance(tests, list) and all(isinstance(line, str) for line in tests):  # MBPP
        tests = "\n".join(tests)
    if isinstance(tests, str):
        return tests, entry_point
    if isinstance(tests, dict):  # APPS, TACO
        entry_point = tests.get("fn_name") or entry_point
        pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
    else:  # LiveCodeBench
        pairs = [(case["input"], case["output"]) for case in tests]
        if tests[0]["testtype"] == "functional":  # each argument is JSON, on a line of its own
            pairs = [(list(map(json.loads, given.split("\n"))), json.loads(to)) for given, to in pairs]
        else:
            entry_point = None
    if entry_point is None:  # standard input and output: texts, or lists of lines
        pairs = [["\n".join(map(str, x if isinstance(x, list) else [x])) for x in pair] for pair in pairs]
    lists = entry_point is None or all(isinstance(given, list) for given, _ in pairs)
    if not lists or all(expected in (None, "") for _, expected in pairs):
        raise ValueError("inputs or outputs are missing")
    return pairs, entry_point


def program_of(text, tests, entry_point) -> str:
    """The fenced block of Python after the thought that defines most of what is tested; else all of it."""
    text, fence, blocks = after_thought(text), None, []
    for line in text.split("\n"):
        indent, mark, info = re.match(r"(\s*)(`{3,}|~{3,}|)(.*)", line, re.DOTALL).groups()
        if fence is None and mark and "`" not in info:
            fence, depth, quotes = mark, len(indent), 0
            blocks.append((re.match(r"\s*(\w*)", info)[1].lower(), []))
        elif fence is not None:
            quotes += line.count('"""') + line.count("'''")
            if mark.startswith(fence) and not info.strip() and len(indent) < depth + 4 and quotes % 2 == 0:
                fence = None
            else:
                blocks[-1][1].append(line[min(depth, len(indent)) :])
    codes = ["\n".join(lines) for language, lines in blocks if language in ("python", "py", "python3")]
    codes = codes or ["\n".join(lines) for _, lines in blocks] or [text]
    wanted = set(re.findall(r"\w+", f"{entry_point} {tests} Solution"))
    defined = re.compile(r"^(?:(?:async )?def|class) +(\w+)", re.MULTILINE)
    return max(reversed(codes), key=lambda code: len(wanted.intersection(defined.findall(code))))
