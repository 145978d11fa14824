import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"pytorch": "torch"}


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
