"""Files that are whole or absent: tensors as safetensors, records as JSON, renamed into place."""

import hashlib
import json
import math
import os
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def check_writable(folder: Path, *files: str, name: str = "run") -> None:
    """OSError unless a folder, there or not, can be written in, and so can those of its files."""
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    for path in (there, *(p for p in map(folder.joinpath, files) if os.path.exists(p))):
        kind = "folder" if path == there else "file"
        is_that = path.is_dir() if path == there else path.is_file()
        if not is_that or not os.access(path, os.W_OK):
            what = "read-only" if is_that else f"no {kind}"
            raise OSError(f"{name}: {folder} cannot be written; {path} is {what}")


def digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def in_units(value: float, unit: str = "B") -> str:
    """A size with the prefix that suits it, such as '41.00 GB'."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:,.2f} {prefix}{unit}"
    return f"{value} {unit}"


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], record: dict | None = None):
    """Write tensors, a JSON-able `record` and the SHA-256 of both, atomically, or raise OSError."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    record = json.loads(json.dumps(record or {}))  # as it will come back
    written = record | {"sha256": _content(tensors, record)}
    # all under one key: safetensors writes several in an order of its own, another each time
    metadata = {"record": json.dumps(written, sort_keys=True)}
    _replace(Path(path), lambda aside: save_file(tensors, aside, metadata))


def load_tensors(path: str | Path, names=None) -> tuple[dict[str, torch.Tensor], dict]:
    """Read what `save_tensors` wrote: tensors on the CPU, and the record.

    All are checked against the SHA-256 in the file; some, those of `names`, are not.
    FileNotFoundError or ValueError names a file that is missing or damaged.
    """
    with _opened(path) as f:
        tensors = {name: f.get_tensor(name) for name in (f.keys() if names is None else names)}
        record = json.loads((f.metadata() or {}).get("record", "{}"))
    written = record.pop("sha256", None)
    if names is None and written not in (None, _content(tensors, record)):
        raise _damaged(path, "its contents are not those that were written")
    return tensors, record


def load_rows(path: str | Path, name: str, rows: list[int]) -> list[torch.Tensor]:
    """Entries along the first axis of one tensor, through a memory map: the rest is not read."""
    with _opened(path) as f:
        tensor = f.get_slice(name)
        return [tensor[row] for row in rows]


def _content(tensors: dict[str, torch.Tensor], record: dict) -> str:
    """SHA-256 of tensors, their names, types and shapes, and of the record beside them."""
    found = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        found.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
        found.update(t.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save_text(path: str | Path, text: str) -> None:
    """Write a text file, atomically."""
    _replace(Path(path), lambda aside: aside.write_text(text))


def save_bytes(path: str | Path, content: bytes) -> None:
    """Write a file of bytes, atomically."""
    _replace(Path(path), lambda aside: aside.write_bytes(content))


def save_json(path: str | Path, record, sort_keys: bool = True) -> None:
    """Write a JSON file, atomically; NaN and infinity, which JSON has not, become null."""
    text = json.dumps(_finite(record), indent=2, sort_keys=sort_keys, allow_nan=False)
    save_text(path, text + "\n")


def _finite(record):
    if isinstance(record, dict):
        return {name: _finite(value) for name, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [_finite(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record


def load_json(path: str | Path):
    """Read a JSON file; FileNotFoundError or ValueError name a missing or damaged one."""
    path = _present(path)
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _replace(path: Path, write) -> None:
    """Let `write(aside)` make the file, then rename it over `path`, or leave that as it is."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; move it, so that a file can be written there")
    # named at random: a process id may be another machine's, too
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(aside, 0o644)  # safetensors writes files that only their owner can read
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        cure = "free some disk space or choose another folder"
        if not all(os.access(p, os.W_OK) for p in (path, path.parent) if p.exists()):
            cure = "make it and its folder writable"
        raise OSError(f"{path} could not be written ({error}); {cure}") from error
    finally:
        with suppress(OSError):  # where nothing can be written, the first error says more
            aside.unlink(missing_ok=True)


def _present(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run the notebook that writes it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; move it and run the notebook that writes the file")
    return path


@contextmanager
def _opened(path: str | Path):
    path = _present(path)
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | Path, why) -> ValueError:
    return ValueError(f"{path} is damaged ({why}); delete it and run the notebook that writes it")
