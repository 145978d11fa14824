import json
import shutil
import sys
from base64 import b64decode, b64encode
from io import BytesIO

import nbformat
import numpy as np
import pytest
import yaml
from nbformat import v4
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image

from helpers.run import __main__ as shell
from helpers.run import notebooks, parameters

FIRST = """
from pathlib import Path
folder = Path("runs") / run
with open("log.txt", "a") as log: log.write("first ")
for name in ("a", "b"):
    if not (folder / name).exists():
        (folder / name).write_text(f"{name} {count}")
"""
SECOND = """
from pathlib import Path
with open("log.txt", "a") as log: log.write("second ")
(Path("runs") / run / "c").write_text((Path("runs") / run / "a").read_text() + scale)
"""


def parameters_cell(source):
    return v4.new_code_cell(source, metadata={"tags": ["parameters"]})


def write_notebook(path, cells):
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "project"
    (root / "notebooks" / "parameters").mkdir(parents=True)
    monkeypatch.setattr(parameters, "ROOT", root)
    monkeypatch.setattr(parameters, "NOTEBOOKS", root / "notebooks")
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def two_notebooks(project):
    """Notebooks that leave files; 00 is not to be run with them."""
    run = 'run: str = "demo"  # run folder\n'
    first = [v4.new_markdown_cell("# One"), parameters_cell(run + "count: int = 1")]
    write_notebook(project / "notebooks/01_first.ipynb", [*first, v4.new_code_cell(FIRST)])
    second = [parameters_cell(run + 'scale: str = "x"'), v4.new_code_cell(SECOND)]
    write_notebook(project / "notebooks/02_second.ipynb", second)
    model = [parameters_cell("other: int = 1"), v4.new_code_cell("raise SystemExit")]
    write_notebook(project / "notebooks/00_model.ipynb", model)
    set_parameters(project, run="tiny", count=3)
    return project


@pytest.fixture
def in_process(monkeypatch):
    """Notebooks are executed in this process, which is quicker than a kernel for each."""

    def execute(notebook, copy, chosen):
        executed = parameterize_notebook(load_notebook_node(str(notebook)), chosen)
        nbformat.write(executed, copy)
        names: dict = {}
        try:
            for cell in executed.cells:
                if cell.cell_type == "code":
                    exec(cell.source, names)
        except ValueError as error:
            raise RuntimeError(f"{notebook.stem} stopped: {error}") from None

    monkeypatch.setattr(notebooks, "_papermill", execute)


def set_parameters(project, name="tiny", **values):
    path = project / "notebooks" / "parameters" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))


def append(notebook, source):
    cells = nbformat.read(notebook, 4).cells
    write_notebook(notebook, [*cells, v4.new_code_cell(source)])


def ran(project):
    """Which notebooks ran since the last question."""
    log = project / "log.txt"
    text = log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    return text.split()


@pytest.mark.process
def test_each_notebook_is_one_line_with_its_seconds(two_notebooks, capfd):
    copies = notebooks.execute("tiny")
    assert ran(two_notebooks) == ["first", "second"]
    folder = two_notebooks / "runs" / "tiny"
    assert copies == [folder / "notebooks" / n for n in ("01_first.ipynb", "02_second.ipynb")]
    assert (folder / "c").read_text() == "a 3x"
    shown = capfd.readouterr()
    assert shown.err == ""
    first, second = shown.out.splitlines()
    assert first.split()[::2] == ["01_first", "s"] and second.split()[::2] == ["02_second", "s"]


def test_companions_are_run_on_request_after_all_others(two_notebooks, in_process):
    project = two_notebooks
    shutil.copy(project / "notebooks/02_second.ipynb", project / "notebooks/09_third.ipynb")
    assert len(notebooks.execute("tiny")) == 2 and ran(project) == ["first", "second"]
    copies = notebooks.execute("tiny", companions=True)
    assert [c.stem for c in copies][2:] == ["09_third"] and ran(project) == ["second"]


def test_what_is_done_and_intact_is_skipped(two_notebooks, in_process, capsys):
    project, folder = two_notebooks, two_notebooks / "runs" / "tiny"
    copies = notebooks.execute("tiny")
    assert ran(project) == ["first", "second"]
    assert notebooks.execute("tiny") == copies and ran(project) == []
    assert capsys.readouterr().out.count("done and intact") == 2

    (folder / "b").unlink()
    notebooks.execute("tiny")
    assert ran(project) == ["first"]

    (folder / "a").unlink()  # not written again in the last run, and still the first notebook's
    notebooks.execute("tiny")
    assert ran(project) == ["first"] and (folder / "a").read_text() == "a 3"

    (folder / "c").write_text("damaged")
    notebooks.execute("tiny")
    assert ran(project) == ["second"] and (folder / "c").read_text() == "a 3x"


def test_what_a_change_touches_is_run_again(two_notebooks, in_process, tmp_path, monkeypatch):
    project, helpers = two_notebooks, tmp_path / "helpers"
    (helpers / "room").mkdir(parents=True)
    (helpers / "room" / "module.py").write_text("x = 1")
    monkeypatch.setattr(notebooks, "HELPERS", helpers)
    notebooks.execute("tiny")
    ran(project)
    set_parameters(project, run="tiny", count=3, scale="y")
    notebooks.execute("tiny")
    assert ran(project) == ["second"]
    append(project / "notebooks/01_first.ipynb", "new = 1")
    notebooks.execute("tiny")
    assert ran(project) == ["first", "second"]
    (helpers / "room" / "module.py").write_text("x = 2")
    notebooks.execute("tiny")
    assert ran(project) == ["first", "second"]


def test_a_plot_of_other_parameters_does_not_stay(two_notebooks, in_process):
    draw = "folder = Path('figures/tiny')\nfolder.mkdir(parents=True, exist_ok=True)\n"
    draw += "(folder / f'{scale}.png').write_text('plot')"
    append(two_notebooks / "notebooks/02_second.ipynb", draw)
    for scale in ("x", "y"):
        set_parameters(two_notebooks, run="tiny", count=3, scale=scale)
        notebooks.execute("tiny")
        assert [p.name for p in (two_notebooks / "figures/tiny").iterdir()] == [f"{scale}.png"]


@pytest.mark.process
def test_a_notebook_that_fails_is_named_and_not_taken_for_done(two_notebooks):
    append(two_notebooks / "notebooks/02_second.ipynb", "raise ValueError('scale is x')")
    for expected in (["first", "second"], ["second"]):
        with pytest.raises(RuntimeError, match="^02_second stopped: scale is x$"):
            notebooks.execute("tiny")
        assert ran(two_notebooks) == expected


@pytest.mark.parametrize(
    "content", ["run: a/b", "run: x\nwrong: 1", "run: 2024", "run: tiny\ncount: 2\nscale: bad"]
)
def test_the_shell_says_what_is_wrong_in_one_sentence(
    two_notebooks, in_process, monkeypatch, content
):
    append(two_notebooks / "notebooks/02_second.ipynb", "if scale == 'bad': raise ValueError('no')")
    (two_notebooks / "notebooks/parameters/bad.yaml").write_text(content)
    monkeypatch.setattr(sys, "argv", ["run", "bad"])
    with pytest.raises(SystemExit, match="^error: [^\n]*$"):
        shell.main()


# --- publishing ---


def stream(text, name="stdout"):
    return v4.new_output("stream", name=name, text=text)


def display(**data):
    data = {name.replace("_", "/"): value for name, value in data.items()}
    return v4.new_output("display_data", data=data, metadata={"papermill": "now"})


def publish(project, outputs):
    """Code cells of a committed notebook once an executed copy with these outputs was published."""
    path, copy = project / "notebooks" / "01_first.ipynb", project / "copy" / "01_first.ipynb"
    sources = [parameters_cell("count: int = 1"), *map(v4.new_code_cell, ("look()", "count"))]
    write_notebook(path, [v4.new_markdown_cell("# One"), *sources])
    executed = nbformat.read(path, 4).cells
    for cell in executed:
        cell.metadata.papermill = {"start_time": "2024-01-01T00:00:00"}
    executed[2].update(outputs=outputs, execution_count=7)
    tags = {"tags": ["injected-parameters"]}
    injected = v4.new_code_cell("# Parameters\ncount = 99", metadata=tags, outputs=[stream("99")])
    write_notebook(copy, [*executed[:2], injected, *executed[2:]])
    notebooks.publish([copy])
    published = nbformat.read(path, 4)
    assert [c.source for c in published.cells] == ["# One", *(c.source for c in sources)]
    assert [dict(c.metadata) for c in published.cells] == [{}, {"tags": ["parameters"]}, {}, {}]
    assert set(published.metadata) == {"kernelspec", "language_info"}
    return [c for c in published.cells if c.cell_type == "code"]


def test_publishing_keeps_what_readers_should_see(project):
    drawn, file = (
        np.random.default_rng(0).integers(256, size=(40, 30, 3), dtype=np.uint8),
        BytesIO(),
    )
    Image.fromarray(drawn).save(file, "png")
    png = b64encode(file.getvalue()).decode()
    picture = display(image_png=png, text_plain="<Figure>")
    picture.metadata["image/png"] = {"width": 15, "height": 20}  # of a figure of twice that
    result = v4.new_output("execute_result", data={"text/plain": "3 µm"}, execution_count=7)
    cells = publish(project, [stream("a line\n"), picture, result])
    assert [c.execution_count for c in cells] == [1, 2, 3]
    text, shown, value = cells[1].outputs
    assert text.text == "a line\n"
    assert shown.metadata == {"image/png": {"width": 15, "height": 20}}
    assert shown.data["text/plain"] == "<Figure>"
    small = Image.open(BytesIO(b64decode(shown.data["image/png"])))
    assert len(shown.data["image/png"]) < len(png) and small.size == (30, 40)
    assert np.abs(np.asarray(small.convert("RGB")).astype(int) - drawn).mean() < 30
    assert value == result | {"execution_count": 2}


def test_publishing_drops_injected_parameters_stderr_widgets_and_times(project):
    data = {notebooks.WIDGET: {"model_id": "abc"}, "text/plain": "HBox()"}
    noise = [stream("100%|###| 3 s", "stderr"), v4.new_output("display_data", data=data)]
    assert all(c.outputs == [] for c in publish(project, noise))
    text = (project / "notebooks" / "01_first.ipynb").read_text()
    for word in ("injected", "99", "papermill", "2024-01-01", "model_id", "###"):
        assert word not in text


@pytest.mark.parametrize("root", ["project", "prôjet with space"])
@pytest.mark.parametrize("form", ["saved {}/runs/x.pdf", "PosixPath('{}/runs')", "in {}", "{}"])
def test_publishing_leaves_no_path_of_the_machine(tmp_path, monkeypatch, root, form):
    root = tmp_path / root
    monkeypatch.setattr(parameters, "ROOT", root)
    monkeypatch.setattr(parameters, "NOTEBOOKS", root / "notebooks")
    text = form.format(root)
    outputs = [stream(text), display(text_plain=text, text_html=f"<b>{text}</b>")]
    shown = publish(root, outputs)[1].outputs
    assert len(shown) == 2
    assert str(tmp_path) not in json.dumps(shown, ensure_ascii=False)
    assert ("runs" in form) == ("runs" in shown[0].text)


def test_publishing_a_copy_of_another_notebook_changes_nothing(project):
    committed, copy = project / "notebooks" / "01_first.ipynb", project / "copy/01_first.ipynb"
    write_notebook(committed, [v4.new_code_cell("a"), v4.new_code_cell("b")])
    write_notebook(copy, [v4.new_code_cell("a")])
    before = committed.read_bytes()
    with pytest.raises(ValueError):
        notebooks.publish([copy])
    assert committed.read_bytes() == before


def test_publishing_twice_gives_the_same_bytes(project):
    path = project / "notebooks" / "01_first.ipynb"
    publish(project, [stream("x")])
    once = path.read_bytes()
    publish(project, [stream("x")])
    assert path.read_bytes() == once
