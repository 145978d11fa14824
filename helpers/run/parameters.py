"""The notebooks' parameters: types as the parameters cell writes them, ranges in one table."""

import ast
import json
import math
from functools import partial
from pathlib import Path

import yaml

from helpers.checks import DTYPES, choose_device, in_range, nearest, one_of, positive, refuse

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"

AT_LEAST_ZERO = (
    *("height", "width", "tokens_per_image", "steps", "guidance_scale", "one_step_factor"),
    *("ridge_strengths", "n_timed", "example_strength", "n_labelled", "n_random", "n_untrained"),
    *("n_examined", "n_planted", "latents", "price_read", "price_written"),
)
RULES = {  # parameter -> what refuses a bad value of it, or a bad entry if it is a list
    **dict.fromkeys(AT_LEAST_ZERO, partial(in_range, low=0)),
    **dict.fromkeys(("ablate_n_keep", "n_steered"), partial(in_range, low=2)),
    **dict.fromkeys(("learning_rate", "strengths"), positive),
    "n_captions": partial(in_range, low=4, high=1200),
    "block_exponent": partial(in_range, low=-4, high=4),
    "seed": partial(in_range, low=0, high=2**32 - 1),
    "signal": partial(one_of, valid=("output", "input", "update")),
    "branch": partial(one_of, valid=("conditional", "unconditional", "both")),
    "steered_branch": partial(one_of, valid=("conditional", "unconditional", "both")),
    "backend": partial(one_of, valid=("reader", "server", "local")),
    "mode": partial(one_of, valid=("activation", "residual")),
    "dtype": partial(one_of, valid=("auto", *DTYPES)),
    "store_dtype": partial(one_of, valid=tuple(DTYPES)),
    "device": lambda name, value: choose_device(value),
}
# the rule of whole numbers that have none of their own
ANY_OTHER_COUNT = partial(in_range, low=1, high=10**12)
NEVER_EMPTY = ("strengths", "hookpoint", "model", "prompts")

KINDS = {  # type as written -> whether a value is of it, in words
    "bool": (lambda v: isinstance(v, bool), "true or false"),
    "int": (lambda v: type(v) is int, "a whole number"),
    "float": (lambda v: type(v) in (int, float) and math.isfinite(v), "a finite number"),
    "str": (lambda v: isinstance(v, str), "a text"),
    "list": (lambda v: isinstance(v, list), "a list"),
    "dict": (lambda v: isinstance(v, dict) and all(isinstance(k, str) for k in v), "named values"),
}


def analysis_notebooks(companions: bool = False) -> list[Path]:
    """Notebooks 01 to 08, in order, and those after them on request; 00 is run alone."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    return [p for p in every if "01" <= p.stem[:2] <= ("99" if companions else "08")]


def parameters_of(notebook: Path) -> dict[str, tuple]:
    """The parameters cell of a notebook, as name -> (default value, type as written)."""
    cells = json.loads(notebook.read_text())["cells"]  # nbformat takes 1.5 s to import
    (cell,) = (c for c in cells if "parameters" in c["metadata"].get("tags", []))
    return {
        line.target.id: (ast.literal_eval(line.value), ast.unparse(line.annotation))
        for line in ast.parse("".join(cell["source"])).body
    }


def checked(values: dict, known: dict[str, tuple]) -> dict:
    """Parameters as they are; ValueError for one that is not as `known` (of `parameters_of`)."""
    for name, value in values.items():
        default, kind = known[name]
        outer, _, inner = kind.removesuffix("]").partition("[")
        fits, valid = KINDS[outer]
        if inner:
            valid += f" with {KINDS[inner][1]} for each entry"
        if not fits(value) or (inner and not all(map(KINDS[inner][0], value))):
            such_as = f", such as {default!r}" if default not in ("", [], {}) else ""
            refuse(name, value, valid + such_as)
        if name in NEVER_EMPTY and not value:
            refuse(name, value, f"{valid}, and not empty")
        if name in RULES or "int" in kind:
            for entry in value if outer == "list" else [value]:
                RULES.get(name, ANY_OTHER_COUNT)(name, entry)
    return values


def load_parameters(name: str) -> dict:
    """What notebooks/parameters/<name>.yaml sets, or a .yaml file by its path."""
    folder = NOTEBOOKS / "parameters"
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.exists():
        there = ", ".join(p.stem for p in sorted(folder.glob("*.yaml")))
        refuse("the file of parameters", name, f"one of {there}, or a path ending in .yaml")
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:160]
        raise ValueError(f"{path.name} cannot be read as YAML ({why})") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        refuse(f"the content of {path.name}", values, "lines of name and value, as run: demo")
    known = {p for notebook in analysis_notebooks(companions=True) for p in parameters_of(notebook)}
    refuse_unknown(values, known, f"{path.name}: a parameter")
    return values


def parameters_for(notebook: str, name: str) -> dict:
    """All parameters of a notebook ('01'): those that the file `name` sets, else defaults."""
    (path,) = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
    known, given = parameters_of(path), load_parameters(name)
    return checked({k: given.get(k, default) for k, (default, _) in known.items()}, known)


def refuse_unknown(names, known, what: str = "a parameter") -> None:
    """ValueError for a name that is none of `known`, with the nearest ones."""
    for name in names:
        if name not in known:
            refuse(what, name, f"one that the notebook has, such as {nearest(name, known)}")


def injected(namespace: dict) -> list[str]:
    """Names that papermill set in this kernel: it ran a cell of its own, under '# Parameters'."""
    cells = [source for source in namespace.get("In", []) if source.startswith("# Parameters\n")]
    lines = [line for source in cells for line in ast.parse(source).body]
    return [target.id for line in lines for target in getattr(line, "targets", [])]
