"""Prompts from text files, tables and datasets."""

import itertools
import re
from contextlib import suppress
from pathlib import Path

from helpers.checks import refuse

TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}


def read_prompts(source: str | Path, n: int | None = None, column: str = "prompt") -> list[str]:
    """The first `n` prompts, blank ones left out: lines of a text file, or a column of a dataset.

    A dataset is a file of one of TABLES, or a name on the Hugging Face hub, whose training split is
    streamed. ValueError or FileNotFoundError, naming `source`: no such file, column or prompt.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in TABLES:
        try:
            rows = path.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            why = f"{error.reason} at byte {error.start}"
            refuse("prompts", str(source), f"a text in UTF-8, or a table ({why})")
    elif path.is_file() or (re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.suffix):
        rows = _column(source, path, column)
    else:
        raise FileNotFoundError(
            f"prompts {str(source)!r} is not a file; valid are 'scenes', 'full', 'none', a text,"
            f" a {', '.join(TABLES)} file, or a dataset's name on the hub, owner/name"
        )
    prompts = list(itertools.islice((row.strip() for row in rows if row and row.strip()), n))
    return prompts or refuse("prompts", str(source), "a file or dataset that holds a prompt")


def _column(source: str | Path, path: Path, column: str):
    """A column of a table, or of a dataset on the hub, row by row; None for an empty cell.

    Of Parquet, no other column is fetched.
    """
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no one need know which files are read here
    name, options = str(source), {}
    if path.is_file():
        name, options = TABLES[path.suffix], {"data_files": str(path)}
    if path.suffix == ".tsv":
        options["sep"] = "\t"
    options |= {"split": "train", "streaming": True}
    try:
        table = datasets.load_dataset(name, **options)
        if column in (table.column_names or ()):
            with suppress(TypeError, ValueError):  # other formats cannot leave columns unread
                table = datasets.load_dataset(name, columns=[column], **options)
        rows = iter(table)
        first = next(rows, {column: None})
    except Exception as error:  # whatever a parser or the network makes of it
        why = (str(error) or type(error).__name__).splitlines()[0][:200]
        refuse("prompts", str(source), f"a table, or a dataset with a training split ({why})")
    if column not in first:
        refuse("prompt_column", column, f"a column of {source}: {', '.join(first)}")
    rows = itertools.chain([first], rows)
    return (None if row[column] is None else str(row[column]) for row in rows)
