"""A reward for the form of GSM8K's solutions; benchmarks/real_model.py adds it to the verifier's."""

import re


def answer_format(prompts, completions, **columns) -> list[float]:
    """1 for a completion whose last line is a number behind GSM8K's mark."""
    texts = [completion[-1]["content"] for completion in completions]
    return [float(bool(re.search(r"\n#### ?-?[$]?[\d,.]+\s*$", text))) for text in texts]
