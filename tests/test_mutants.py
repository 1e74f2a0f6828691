"""The table of mutants fits the code; `make torture` tries each."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks" / "mutants.py")
mutants = importlib.util.module_from_spec(SPEC)
sys.modules["mutants"] = mutants
SPEC.loader.exec_module(mutants)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.safety)
def test_every_mutant_still_fits_its_file_and_is_code(mutant):
    whole = (ROOT / mutant.file).read_text()
    assert whole.count(mutant.text) == 1
    changed = whole.replace(mutant.text, mutant.instead)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(whole))
    assert (ROOT / "tests" / mutant.tests.split(".py")[0]).with_suffix(".py").is_file()


def test_no_safety_is_named_twice():
    names = [mutant.safety for mutant in mutants.MUTANTS]
    assert len(names) == len(set(names)) >= 80
