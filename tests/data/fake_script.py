"""Fits one number by gradient descent.

python fake.py --rate 0.5
"""

import pydantic
import tyro
from pydantic import PositiveInt


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@pydantic.dataclasses.dataclass
class Args:
    # Optimization
    rate: float = 0.1  # step size, in units of the target
    # number of steps,
    # over the whole run
    num_steps: PositiveInt = 4

    # Output
    verbose: bool = False  # print the loss
    folder: str | None = None  # folder of the run; by default run

    def __post_init__(self):
        self.folder = self.folder or "run"
        if self.rate <= 0:
            raise ValueError("--rate must be positive")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def square_loss(x, target):
    """Half the squared distance of the numbers `x` and `target`."""
    return 0.5 * (x - target) ** 2


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------
def main(args):
    x = 0.0
    for _ in range(args.num_steps):
        x = descend(x, 1.0, args.rate)
    if args.verbose:
        print(args.folder, square_loss(x, 1.0))
    return {"loss": square_loss(x, 1.0)}


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
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
