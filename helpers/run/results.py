"""Reading a sweep's table: figures over training seeds and images, for notebook 07."""

from __future__ import annotations

import itertools
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.measure.metrics import Estimate
from helpers.measure.readouts import over_seeds
from helpers.run.sweep import ROW, Cell, steps_as_text

FIELDS = [f.name for f in fields(Cell)]


class Results:
    """A sweep's CSV, of which any part may be missing; `default` is the cell of its file.

    Where a method asks for cells, it takes values of their fields, or lists of them; what is not
    named is as in `default`, and all training seeds are taken together.
    """

    def __init__(self, path: str | Path, default: Cell):
        self.default = asdict(default) | {"steps": steps_as_text(default.steps)}
        self.rows = pd.DataFrame(columns=[*FIELDS, *ROW])
        if Path(path).exists():
            self.rows = pd.read_csv(path)
        self._of: dict[tuple, list[dict]] = {}  # read-out and all fields but the seed -> rows
        for row in self.rows.to_dict("records"):
            self._of.setdefault(_key(row["readout"], row), []).append(row)

    def estimates(self, readout: str, less_raw: bool = False, **cells) -> pd.DataFrame:
        """A row for each combination of the listed values that is in the table, in their order.

        Columns: the fields with several values, then value, low, high, and the number of `seeds`.
        With `less_raw`, of the difference from the same cells in raw coordinates.
        """
        listed = {n: v if isinstance(v, list) else [v] for n, v in cells.items()}
        varied = [name for name, values in listed.items() if len(values) > 1]
        columns, found = ROW[4:] if less_raw else ROW[1:4], []
        for values in itertools.product(*listed.values()):
            chosen = dict(zip(listed, values))
            rows = self._of.get(_key(readout, self.default | chosen), [])
            figures = np.array([[row[c] for c in columns] for row in rows]).reshape(-1, 3)
            value, low, high = figures[~np.isnan(figures[:, 0])].T
            if len(value):
                row = {name: chosen[name] for name in varied}
                row |= over_seeds(value, (high - low) / 2)._asdict()
                found.append(row | {"seeds": len(value)})
        return pd.DataFrame(found, columns=[*varied, *Estimate._fields, "seeds"])

    def overview(self, readouts: list[str], less_raw: list[str] = (), **cells) -> pd.DataFrame:
        """A table in words: rows are cells, columns read-outs, then differences from raw."""
        parts = [(name, self.estimates(name, **cells)) for name in readouts]
        parts += [(f"{n}, less raw", self.estimates(n, True, **cells)) for n in less_raw]
        columns = [_in_words(name, part) for name, part in parts if len(part)]
        return pd.concat(columns, axis=1).fillna("") if columns else pd.DataFrame()

    def done(self, cells: list[Cell]) -> int:
        """How many of some cells are in the table."""
        there = set(self.rows[FIELDS].itertuples(index=False, name=None))
        texts = (asdict(cell) | {"steps": steps_as_text(cell.steps)} for cell in cells)
        return sum(tuple(text[name] for name in FIELDS) in there for text in texts)


def _key(readout: str, cell: dict) -> tuple:
    return readout, *(cell[name] for name in FIELDS if name != "seed")


def _in_words(name: str, part: pd.DataFrame) -> pd.Series:
    """Estimates as text, by the fields that vary."""
    words = [str(Estimate(*v)).replace(" [nan, nan]", "") for v in part[[*Estimate._fields]].values]
    varied = [c for c in part.columns if c in FIELDS]
    return part[varied].assign(**{name: words}).set_index(varied or None)[name]
