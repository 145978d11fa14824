"""A study's table: a CSV beside the figures, committed, that another machine can continue.

Beside it a JSON says which trajectories its rows were made from, each by its fingerprint.
"""

import csv
from pathlib import Path

from helpers.files import load_json, save_json, save_text


def save(path: Path, text: str, made_from: dict[str, str]) -> None:
    """Write a table, and what it was made from; what it was before stays, but for these."""
    save_text(path, text)
    save_json(path.with_suffix(".json"), _made_from(path) | made_from)


def _made_from(path: Path) -> dict[str, str]:
    record = path.with_suffix(".json")
    return load_json(record) if record.exists() else {}


def unchanged(path: Path, made_from: dict[str, str]) -> set[str]:
    """Those trajectories that a table's rows were made from as they are now."""
    before = _made_from(path)
    return {name for name, fingerprint in made_from.items() if before.get(name) == fingerprint}


def rows(path: Path, n: int) -> dict[tuple[str, ...], list[list[str]]]:
    """The rows of a table by their first n columns, without those; none if there is no table."""
    found: dict[tuple[str, ...], list[list[str]]] = {}
    for row in csv.reader(path.read_text().splitlines()[1:]) if path.exists() else ():
        found.setdefault(tuple(row[:n]), []).append(row[n:])
    return found
