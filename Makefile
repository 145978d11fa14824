PYTHON ?= python3
BIN := .venv/bin
# tests run a process a core: a thread each, and no core kept busy by waiting
QUIET := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false

.PHONY: demo test quick notebooks lab run sweep scorecard estimate bench gpu slow clean

# Run notebooks 01 to 08 on the shipped model; what is done and intact is skipped.
demo: .venv/installed
	$(BIN)/python -m helpers.run demo

# The same with another file of notebooks/parameters: make run RUN=sd15
run: .venv/installed
	$(BIN)/python -m helpers.run $(RUN)

# Train and measure what notebook 07 compares, as far as it is not done: make sweep RUN=comparison
sweep: .venv/installed
	$(BIN)/python -m helpers.run.sweep $(RUN)

# Steer, and judge, what notebook 08 compares, as far as it is not done.
scorecard: .venv/installed
	$(BIN)/python -m helpers.run.scorecard $(or $(RUN),scorecard)

# Format, lint, unit tests, papermill with changed parameters, every notebook at smoke size.
test: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(QUIET) $(BIN)/python -m pytest tests -n 2
	rm -rf runs/smoke runs/smoke_demo_model
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks

# The inner loop: what starts no processes of its own.
quick: .venv/installed
	$(QUIET) $(BIN)/python -m pytest tests -n 2 -m "not process and not slow and not gpu"

# All that must be tried on CUDA, with the table of speeds in figures/bench/gpu.json.
gpu: .venv/installed
	$(BIN)/python -m tests.test_gpu

# Stable Diffusion 1.5 at full size with random weights, images of 128 × 192, through every
# notebook: 10 GB of memory, 5 GB of disk, about ten minutes. SAEs to and from SAELens and sparsify.
slow: .venv/installed .venv-peers/installed
	$(BIN)/python -m pytest tests -m slow -s

# What a run will take, before it is begun: make estimate RUN=sd15
estimate: .venv/installed
	$(BIN)/python -m helpers.run.estimate $(RUN)

# Speed and memory as ratios, measured here, into figures/README.md; run it when nothing else runs.
bench: .venv/installed .venv-peers/installed
	$(BIN)/python -m tests.benchmarks --readme

# Renew what is committed: outputs of the notebooks, figures/demo with its cards, the tables.
notebooks: .venv/installed
	$(BIN)/python -m helpers.run demo --publish
	rm -rf figures/demo/cards
	$(BIN)/python -m helpers.explorer.cards demo --steer --folder figures/demo/cards

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
