"""Files that are whole or absent: tensors as safetensors, records as JSON, both written aside and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def _replace(path: Path, write) -> None:
    """Let `write(aside)` make the file, then rename it over `path`; a failure leaves `path` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # a process id may be another machine's, too
    try:
        write(aside)
        with open(aside, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(aside, 0o644)  # safetensors writes files that only their owner can read
        os.replace(aside, path)
    except Exception as error:
        # safetensors reports a full disk as its own error type, not as OSError
        if isinstance(error, OSError | SafetensorError):
            raise OSError(f"{path} could not be written ({error}); free some disk space or choose another folder") from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], record: dict | None = None) -> None:
    """Write tensors, and a JSON-able `record` in the file's metadata, as one safetensors file, atomically.

    Raises
    ------
    OSError
        The file cannot be written (full disk, no permission); what stood at `path` is untouched.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"record": json.dumps(record or {}, sort_keys=True)}
    _replace(Path(path), lambda aside: save_file(tensors, aside, metadata))


def load_tensors(path: str | Path, names=None) -> tuple[dict[str, torch.Tensor], dict]:
    """Read what `save_tensors` wrote: tensors on the CPU (all, or those of `names`), and the record.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file, or a damaged one; the sentence names it.
    """
    with _opened(path) as f:
        tensors = {name: f.get_tensor(name) for name in (f.keys() if names is None else names)}
        return tensors, json.loads((f.metadata() or {}).get("record", "{}"))


def load_rows(path: str | Path, name: str, rows: list[int]) -> list[torch.Tensor]:
    """Some entries along the first axis of one tensor in a file, through a memory map: the rest is not read."""
    with _opened(path) as f:
        tensor = f.get_slice(name)
        return [tensor[row] for row in rows]


@contextmanager
def _opened(path: str | Path):
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run the notebook that writes it first")
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the notebook that writes it again") from error


def save_text(path: str | Path, text: str) -> None:
    """Write a text file, atomically."""
    _replace(Path(path), lambda aside: aside.write_text(text))


def save_json(path: str | Path, record) -> None:
    """Write a JSON file, atomically."""
    save_text(path, json.dumps(record, indent=2, sort_keys=True) + "\n")


def load_json(path: str | Path):
    """Read a JSON file; a missing or damaged one raises FileNotFoundError or ValueError with its name."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run the notebook that writes it first")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the notebook that writes it again") from error
