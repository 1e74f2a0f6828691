"""How many trials the tests of faults do: the usual, or those of `make torture`."""

import os
from pathlib import Path


def most(usual: int, torture: int) -> int:
    """usual, or with EVENLIGHT_TORTURE=SHARE that share of torture, at least the usual."""
    return max(usual, round(float(os.environ.get("EVENLIGHT_TORTURE", 0)) * torture))


def trials(usual: int, torture: int) -> int:
    """The same, told of."""
    return tell(most(usual, torture))


def tell(number: int) -> int:
    """Write down for the table of `make torture` how many trials this test does."""
    if log := os.environ.get("EVENLIGHT_TORTURE_LOG"):
        with Path(log).open("a") as file:
            file.write(f"{os.environ['PYTEST_CURRENT_TEST'].split(' ')[0]}\t{number}\n")
    return number
