"""Rewards that the tests name in --reward: some that differ between completions, some that go wrong."""

import json
import os

import torch


def residue(completion_ids, **columns):
    return [sum(ids) % 7 / 3 for ids in completion_ids]


def rare(completion_ids, **columns):
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def tensor(**columns):
    return torch.tensor(residue(**columns))


def given(completions, score, **columns):
    return score


def nothing(completions, **columns):
    return [None] * len(completions)


def seen(prompts, completions, completion_ids, max_completion_length, **columns):
    """Writes all that it is given to the file $SEEN; the reward is the length."""
    columns |= {"longest": max_completion_length}
    with open(os.environ["SEEN"], "a", encoding="utf-8") as file:
        file.write(json.dumps([prompts, completions, completion_ids, columns]) + "\n")
    return [float(len(ids)) for ids in completion_ids]


def text(completions, **columns):
    return "1" * len(completions)


def matrix(completions, **columns):
    return torch.zeros(len(completions), 2)


def raises(completions, answer, **columns):
    if "13" in answer:
        raise KeyError("no such key")
    return [0.0] * len(completions)


def together(completions, **columns):
    return [1 / (len(completions) == 1)] * len(completions)


def rubric(completions, rubric, **columns):
    return [0.0] * len(completions)


def positional(completions):
    return [0.0] * len(completions)


def same(completions, **columns):
    return [1.0] * len(completions)


def beats(completions, opponent, **columns):
    return [None if y is None else float(x[-1]["content"] > y) for x, y in zip(completions, opponent)]
