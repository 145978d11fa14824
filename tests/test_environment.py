import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"pytorch": "torch", "playwright-python": "playwright"}


def split(requirement):
    """'pytest>=9,<10' -> ('pytest', {'>=9', '<10'})."""
    name, ranges = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(.*)", requirement).groups()
    return CONDA_NAMES.get(name, name).lower(), {r.strip() for r in ranges.split(",") if r.strip()}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def environment():
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def test_both_files_list_the_same_packages_with_the_same_ranges(project, environment):
    wanted = dict(map(split, project["dependencies"] + project["optional-dependencies"]["test"]))
    listed = dict(split(d) for d in environment["dependencies"] if isinstance(d, str))
    assert listed.pop("python") == split("python" + project["requires-python"])[1]
    listed.pop("pip")
    assert listed == wanted


def test_no_package_is_listed_twice(environment):
    names = [split(d)[0] for d in environment["dependencies"] if isinstance(d, str)]
    assert len(names) == len(set(names))


def test_pip_installs_this_project_and_nothing_else(environment):
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert len(pip) == 1 and re.fullmatch(r"(--no-deps )?(-e|--editable) \.", pip[0])


def test_packages_come_from_conda_forge_first(environment):
    assert environment["channels"][0] == "conda-forge"


def test_every_package_is_bounded_from_below(project):
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        assert any(r.startswith(">=") for r in split(requirement)[1]), requirement


def test_pinned_versions_are_within_the_ranges(project):
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pinned = {name.lower(): version for name, version in pinned.items()}
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        given = Requirement(requirement)
        assert given.specifier.contains(pinned[given.name.lower()]), requirement


# --- an installed wheel ---

IN_AN_EMPTY_PLACE = """
import importlib, pkgutil, sys, helpers, torch
assert helpers.__file__.startswith(sys.prefix), helpers.__file__
for module in pkgutil.walk_packages(helpers.__path__, "helpers."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from helpers.plots.style import use_style
from helpers.run.folder import load_model
use_style()
print(sum(w.numel() for w in load_model("demo", "cpu").unet.parameters()))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the checkout, built from a copy of it, so that nothing is left behind."""
    copy, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT / "helpers", copy / "helpers", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, copy], check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.process
def test_a_wheel_holds_every_file_of_helpers(wheel):
    files = {p.relative_to(ROOT) for p in (ROOT / "helpers").rglob("*") if p.is_file()}
    wanted = {str(p) for p in files if "__pycache__" not in p.parts}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert wanted - held == set()
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"helpers"}


@pytest.mark.process
def test_a_wheel_works_where_the_project_is_not(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    dependencies = Path(torch.__file__).parents[1]  # the tests' own: only `helpers` is installed
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    command = [python, "-c", IN_AN_EMPTY_PLACE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 1_000_000
