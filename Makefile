PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test notebooks lab run clean

# Run notebooks 01 to 06 on the shipped model; what is done and intact is skipped.
demo: .venv/installed
	$(BIN)/python -m helpers.runs demo

# The same with another file of notebooks/parameters: make run RUN=sd15
run: .venv/installed
	$(BIN)/python -m helpers.runs $(RUN)

# Lint, unit tests, every notebook at smoke size, papermill with changed parameters.
test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests
	rm -rf runs/smoke runs/smoke_demo_model
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks

# Renew what is committed: outputs of the notebooks, figures/demo, the README's results table.
notebooks: .venv/installed
	$(BIN)/python -m helpers.runs demo --publish

lab: .venv/installed
	$(BIN)/jupyter lab notebooks

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf .venv runs
