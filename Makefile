PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow notebooks lab run estimate bench clean

# Run notebooks 01 to 06 on the shipped model; what is done and intact is skipped.
demo: .venv/installed
	$(BIN)/python -m helpers.run.folder demo

# The same with another file of notebooks/parameters: make run RUN=sd15
run: .venv/installed
	$(BIN)/python -m helpers.run.folder $(RUN)

# Lint, unit tests, every notebook at smoke size, papermill with changed parameters.
test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests
	rm -rf runs/smoke runs/smoke_demo_model
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks

# Stable Diffusion 1.5 at full size with random weights, images of 128 × 192, through every notebook: 10 GB of memory, 5 GB of disk, about ten minutes.
slow: .venv/installed
	$(BIN)/python -m pytest tests -m slow -s

# What a run will take, before it is begun: make estimate RUN=sd15
estimate: .venv/installed
	$(BIN)/python -m helpers.run.estimate $(RUN)

# Speed and memory as ratios, measured here, into the README; run it when nothing else runs.
bench: .venv/installed .venv-peers/installed
	$(BIN)/python -m tests.benchmarks --readme

# Renew what is committed: outputs of the notebooks, figures/demo, the README's results table.
notebooks: .venv/installed
	$(BIN)/python -m helpers.run.folder demo --publish

lab: .venv/installed
	$(BIN)/jupyter lab notebooks

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

.venv-peers/installed: tests/peers.txt constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --constraint constraints.txt --requirement tests/peers.txt
	touch $@

clean:
	rm -rf .venv .venv-peers runs
