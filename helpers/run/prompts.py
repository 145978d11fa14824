"""Prompts from text files, tables and datasets."""

from __future__ import annotations

import itertools
import re
from pathlib import Path


def read_prompts(source: str | Path, n: int | None = None, column: str = "prompt") -> list[str]:
    """The first `n` prompts, blank ones left out, of a text file (one a line), of a column of a .csv, .tsv, .parquet, .json
    or .jsonl file, or of a dataset on the Hugging Face hub (its training split, streamed).

    Raises ValueError or FileNotFoundError, naming `source`, if there is no such file, column or prompt.
    """
    source = str(source)
    path = Path(source).expanduser()
    kind = {
        ".csv": "csv",
        ".tsv": "csv",
        ".parquet": "parquet",
        ".json": "json",
        ".jsonl": "json",
    }.get(path.suffix)
    if path.is_file() and kind is None:
        try:
            rows = path.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"prompts {source!r} is not a text in UTF-8 ({error.reason} at byte {error.start}); valid is a text file with a prompt a line, or a table"
            ) from error
    elif not path.is_file() and (path.suffix or not re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
        raise FileNotFoundError(
            f"prompts {source!r} is not a file; valid are 'scenes', a .txt, .csv, .tsv, .parquet, .json or .jsonl file, or a dataset's name on the hub, owner/name"
        )
    else:
        rows = _column(source, path, kind, column)
    prompts = list(itertools.islice((row.strip() for row in rows if row and row.strip()), n))
    if not prompts:
        raise ValueError(f"prompts {source!r} holds no prompt; it needs at least one")
    return prompts


def _column(source, path, kind, column):
    """A column of a table or of a dataset on the hub, row by row."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # nobody need know which files are read here
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        table = (
            datasets.load_dataset(
                kind, data_files=str(path), split="train", streaming=True, **options
            )
            if kind
            else datasets.load_dataset(source, split="train", streaming=True)
        )
        first = next(iter(table), None)
    except Exception as error:  # whatever a parser or the network makes of it
        raise ValueError(
            f"prompts {source!r} could not be read ({str(error).splitlines()[0][:200] if str(error) else type(error).__name__}); valid is a table or a dataset with a training split"
        ) from error
    if first is not None and column not in first:
        raise ValueError(
            f"prompt_column {column!r} is not in {source!r}; valid are {', '.join(first)}"
        )
    return (None if row[column] is None else str(row[column]) for row in table)
