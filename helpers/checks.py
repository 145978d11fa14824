"""Checks of what a person gives: one sentence names the parameter, its value and what is valid."""

import difflib
import math
import os
import re
from collections.abc import Iterable
from numbers import Real
from typing import NoReturn

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def refuse(name: str, value, valid: str) -> NoReturn:
    """Raise ValueError: "`name` is `value`; it must be `valid`", a long value cut in the middle."""
    shown = repr(value)
    if len(shown) > 120:  # of a path, the end says most
        shown = f"{shown[:40]}…{shown[-79:]}"
    raise ValueError(f"{name} is {shown}; it must be {valid}")


def in_range(name: str, value, low: float, high: float = math.inf):
    """The value, if it is a finite number with low <= value <= high; else ValueError names it."""
    if not isinstance(value, Real) or not math.isfinite(value) or not low <= value <= high:
        refuse(name, value, f"at least {low}" if high == math.inf else f"from {low} to {high}")
    return value


def positive(name: str, value):
    """The value, if it is a finite number above 0; else ValueError names it."""
    if not isinstance(value, Real) or not 0 < value < math.inf:
        refuse(name, value, "above 0")
    return value


def one_of(name: str, value, valid: Iterable):
    """The value, if it is one of `valid`; else ValueError lists them."""
    valid = list(valid)
    if value not in valid:
        refuse(name, value, f"one of {', '.join(map(repr, valid))}")
    return value


def nearest(name: str, known: Iterable[str], n: int = 4) -> str:
    """The `n` known names most like a misspelt one, or the first `n`, as "a, b, c"."""
    known = list(known)
    return ", ".join(difflib.get_close_matches(str(name), known, n, 0.5) or known[:n])


def choose_device(device: str) -> str:
    """'auto' is CUDA, else MPS, else the CPU; anything else must be a device that is there."""
    there = {"cuda": torch.cuda, "mps": torch.backends.mps}
    present = [kind for kind, backend in there.items() if backend.is_available()] + ["cpu"]
    if device == "auto":
        return present[0]
    named = re.fullmatch(r"(\w+)(:\d+)?", str(device))
    if not named or named[1] not in present:
        refuse("device", device, f"'auto' or {', '.join(map(repr, present))}, which are here")
    return str(device)


def memory(device) -> int:
    """Bytes that a CUDA device has or, of all others, the machine."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_dtype(dtype: str, auto: torch.dtype = torch.float32, name: str = "dtype") -> torch.dtype:
    """'float32', 'float16' or 'bfloat16' as a torch dtype; 'auto' is what the caller says."""
    return auto if dtype == "auto" else DTYPES[one_of(name, dtype, DTYPES)]
