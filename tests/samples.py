"""Numbers, messages, and the rows and models of tiny/, as the tests of several scripts use them."""

import functools
import math

import torch
from conftest import ROOT, read_lines
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

CPU = torch.device("cpu")
END = 2  # <|im_end|> of tiny's tokenizer


def float64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def asked(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@functools.cache
def tiny_rows(name: str, count: int = 200) -> list[dict]:
    """The first rows of a data set of tiny/."""
    return read_lines(ROOT / "tiny" / "data" / f"{name}.jsonl")[:count]


@functools.cache
def tiny_tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny" / "sft")


def stock(folder):
    """A language model as plain transformers loads it: nothing in it knows of packed rows."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(ROOT / folder, **options).eval()


def stock_classifier(folder):
    """A classifier of one output, likewise."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", "num_labels": 1}
    return AutoModelForSequenceClassification.from_pretrained(ROOT / folder, **options).eval()


def gradient_norm(model) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
