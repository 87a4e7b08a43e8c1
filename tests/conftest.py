"""Settings, options and fixtures of the tests: offline, CPU, two threads, slow tests only when asked for."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Before torch, transformers or wandb are imported, so that they and the subprocesses of the tests see them.
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))  # equal sums on any machine

BANNER = "\n".join(("# " + "-" * 108, "# {}", "# " + "-" * 108))
FAKE = f'''"""Fits one number by gradient descent.

    python fake.py --rate 0.5
"""

from dataclasses import dataclass, field

import tyro

{BANNER.format("Arguments")}


@dataclass
class Args:
    rate: float = 0.1
    """Step size, in units of the target."""
    num_steps: int = 4
    """Number of steps."""
    verbose: bool = False
    """Print the loss."""
    half: int = field(init=False)
    """Half of the steps, over which the rate is constant."""

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError("--rate must be positive")
        self.half = self.num_steps // 2


{BANNER.format("Algorithm")}


def square_loss(x, target):
    """Half the squared distance of the numbers `x` and `target`."""
    return 0.5 * (x - target) ** 2


{BANNER.format("Training")}


def main(args):
    x = 0.0
    for _ in range(args.half):
        x = descend(x, 1.0, args.rate)
    if args.verbose:
        print(square_loss(x, 1.0))
    return {{"loss": square_loss(x, 1.0)}}


{BANNER.format("Plumbing")}


# No momentum.
def descend(x, target, rate):
    """One step of gradient descent."""
    gradient = x - target
    step = rate * gradient
    if abs(step) > 1:
        step = step / abs(step)
    new = x - step
    return new


if __name__ == "__main__":
    main(tyro.cli(Args))
'''


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (minutes each)")
    parser.addoption("--gpu", action="store_true", help="let the tests see the GPU, and run those marked gpu")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    for item in items:
        for marker in ("slow", "gpu"):
            if marker in item.keywords and not config.getoption(f"--{marker}"):
                item.add_marker(pytest.mark.skip(reason=f"needs --{marker}"))


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the embedded tokenizer, checkpoints and data."""
    return ROOT / "tiny"


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """A local copy of GSM8K: $CLEANPOST_GSM8K, else ../shared/data/gsm8k; the test is skipped without one."""
    path = Path(os.environ.get("CLEANPOST_GSM8K", ROOT.parent / "shared" / "data" / "gsm8k"))
    if not path.is_dir():
        pytest.skip("no local copy of GSM8K")
    return path


@pytest.fixture
def fake(tmp_path):
    """fake("a.py", (old, new), ...) writes a small script that obeys every house rule, then edits it."""

    def write(name="fake.py", *edits):
        text = FAKE
        for old, new in edits:
            assert old in text, f"the fake script has no {old!r}"
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
