import ast

import nbformat
import papermill
import pytest
import yaml

from helpers.run import parameters

KNOWN = {
    "seed": (0, "int"),
    "k": (20, "int"),
    "learning_rate": (0.5, "float"),
    "ship": (False, "bool"),
    "run": ("demo", "str"),
    "also": ({}, "dict"),
    "steps": ([], "list[int]"),
    "strengths": ([1.0], "list[float]"),
    "windows": ([], "list[list]"),
    "show": ([], "list[str]"),
    "device": ("auto", "str"),
    "mode": ("activation", "str"),
}
WRONG_TYPE = {
    "k": (4.5, "4", True, None),
    "learning_rate": ("2e-3", float("nan"), False),
    "ship": ("no", 0),
    "run": (7,),
    "also": ([], {1: "x"}),
    "steps": (5, "[0, 4]", [0.5]),
    "strengths": ([float("inf")],),
    "windows": ([3],),
    "show": ("colour=red",),
}
OUT_OF_RANGE = {
    "k": (0, -3),
    "seed": (-1, 2**32),
    "learning_rate": (0, -1e-3),
    "steps": ([0, -1],),
    "strengths": ([], [1.0, 0.0]),
    "device": ("gpu",),
    "mode": ("both", ""),
}
NOTEBOOKS = sorted(parameters.NOTEBOOKS.glob("[0-9]*.ipynb"))


@pytest.mark.parametrize(
    "name, value",
    [
        (name, value)
        for table in (WRONG_TYPE, OUT_OF_RANGE)
        for name, values in table.items()
        for value in values
    ],
)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is ") as refused:
        parameters.checked({name: value}, KNOWN)
    assert "; it must be " in str(refused.value)


def test_a_refusal_says_what_would_be_valid():
    with pytest.raises(ValueError, match="^k is '4'; it must be a whole number, such as 20$"):
        parameters.checked({"k": "4"}, KNOWN)
    valid = r"a list with a whole number for each entry"
    with pytest.raises(ValueError, match=rf"^steps is \[0.5\]; it must be {valid}$"):
        parameters.checked({"steps": [0.5]}, KNOWN)


def test_right_values_pass_as_they_are():
    values = {"seed": 0, "k": 1, "learning_rate": 2, "ship": True, "run": "x", "also": {"a": 1}}
    values |= {"steps": [0], "strengths": [1, 0.5], "windows": [[0, 1]], "show": []}
    assert parameters.checked(values, KNOWN) == values


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_defaults_and_smoke_values_of_a_notebook_pass(notebook):
    known = parameters.parameters_of(notebook)
    cells = nbformat.read(notebook, as_version=4).cells
    (mock,) = [c.metadata["nbmake"]["mock"] for c in cells if "nbmake" in c.metadata]
    for values in ({name: default for name, (default, _) in known.items()}, mock):
        assert parameters.checked(values, known) == values
        assert set(values) <= set(known)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_reads_the_same_with_a_word_of_help_for_each(notebook):
    shown = papermill.inspect_notebook(str(notebook))
    assert {
        name: (ast.literal_eval(p["default"]), p["inferred_type_name"]) for name, p in shown.items()
    } == parameters.parameters_of(notebook)
    assert all(p["help"] for p in shown.values())


def test_every_measure_and_choice_has_a_rule():
    free = {"run", "model", "revision", "prompts", "prompt_column", "hookpoint", "output"}
    free |= {"sweep", "scorecard", "probed", "judge", "lpips"}
    free |= {"state", "dictionary", "vlm", "base_url", "key", "encoder", "prompt_style"}
    for notebook in NOTEBOOKS:
        for name, (_, kind) in parameters.parameters_of(notebook).items():
            if "float" in kind or (kind == "str" and name not in free):
                assert name in parameters.RULES, (notebook.stem, name)


# --- files of parameters ---


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two notebooks and the parameter file `tiny`."""
    monkeypatch.setattr(parameters, "ROOT", tmp_path)
    monkeypatch.setattr(parameters, "NOTEBOOKS", tmp_path / "notebooks")
    (tmp_path / "notebooks" / "parameters").mkdir(parents=True)
    for name, source in (
        ("00_model", "other: int = 1"),
        ("01_first", 'run: str = "demo"  # folder\ncount: int = 1  # how many'),
        ("02_second", 'run: str = "demo"  # folder\nscale: list[str] = ["x"]'),
    ):
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("#"), cell])
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    write(tmp_path, run="tiny", count=3)
    return tmp_path


def write(project, name="tiny", **values):
    path = project / "notebooks" / "parameters" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))


def test_parameters_are_those_of_the_tagged_cell(project):
    first, second = parameters.analysis_notebooks()
    assert (first.name, second.name) == ("01_first.ipynb", "02_second.ipynb")
    assert parameters.parameters_of(first) == {"run": ("demo", "str"), "count": (1, "int")}
    assert parameters.parameters_of(second)["scale"] == (["x"], "list[str]")


def test_a_parameter_file_is_found_by_name_and_by_path(project, tmp_path):
    assert parameters.load_parameters("tiny") == {"run": "tiny", "count": 3}
    (tmp_path / "mine.yaml").write_text("scale: [y]\n")
    assert parameters.load_parameters(str(tmp_path / "mine.yaml")) == {"scale": ["y"]}
    (tmp_path / "nothing.yaml").write_text("# only a comment\n")
    assert parameters.load_parameters(str(tmp_path / "nothing.yaml")) == {}


def test_a_notebook_has_its_defaults_under_what_a_file_sets(project):
    assert parameters.parameters_for("01", "tiny") == {"run": "tiny", "count": 3}
    assert parameters.parameters_for("02", "tiny") == {"run": "tiny", "scale": ["x"]}
    write(project, count="3")
    with pytest.raises(ValueError, match="^count is '3'; "):
        parameters.parameters_for("01", "tiny")


@pytest.mark.parametrize("name, near", [("cuont", "count"), ("sclae", "scale"), ("other", "")])
def test_a_parameter_no_notebook_has_is_named_with_the_nearest(project, name, near):
    write(project, run="tiny", **{name: 1})
    with pytest.raises(
        ValueError, match=f"^tiny.yaml: a parameter is '{name}'; .*such as .*{near}"
    ):
        parameters.load_parameters("tiny")


@pytest.mark.parametrize("text", ["a: [", "\ta: 1", "7", "[]", "3: 4"])
def test_a_file_that_holds_no_parameters_is_named(project, tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match="bad.yaml"):
        parameters.load_parameters(str(tmp_path / "bad.yaml"))


def test_a_missing_file_is_named_with_those_there(project):
    with pytest.raises(ValueError, match="'tny'; it must be one of tiny, or a path"):
        parameters.load_parameters("tny")


def test_names_that_papermill_injected_are_found_in_the_kernels_history():
    cells = ["", "k: int = 3", "# Parameters\nk = 4\nn_latent = [1, 2]\n", "other = 1"]
    assert parameters.injected({"In": cells, "k": 4, "other": 1}) == ["k", "n_latent"]
    assert parameters.injected({"k": 4}) == []
