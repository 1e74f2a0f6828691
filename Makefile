# Two commands do everything on a fresh machine: make demo, make test.
VENV := .venv
BIN := $(VENV)/bin

unexport PYTHONDONTWRITEBYTECODE  # else every process compiles torch anew: 6 s each
# Waiting threads give way: spinning ones make a training step take 20 s for 1 on a busy machine.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test quick gpu torture check site wheel clean

demo: $(VENV)/ready
	$(BIN)/python -m evenlight.pipeline.demo demo-output
	@echo "open demo-output/report.html"

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

quick: $(VENV)/ready  # while at work: all but the tests that take more than about ten seconds
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not slow'

gpu: $(VENV)/ready  # on a machine that has one: is the scan right on it, and how fast is it
	$(BIN)/python -m pytest -q tests/test_scan.py
	$(BIN)/python -m benchmarks.scan --device cuda

torture: $(VENV)/ready  # hours: every fault with its full counts, and every safety removed once
	$(BIN)/python -m benchmarks.torture

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

site: $(VENV)/ready  # docs/ for a browser: build/site/index.html
	$(BIN)/python -m typer evenlight.cli utils docs --name evenlight --title Commands \
	    --output docs/commands.md > /dev/null
	$(BIN)/mkdocs build --quiet --strict

wheel: $(VENV)/ready
	.ci/wheel

$(VENV)/ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt -e '.[dev]'
	mkdir -p .typing && ln -sfn .. .typing/evenlight
	touch $@

clean:
	rm -rf $(VENV) .typing build demo-output
