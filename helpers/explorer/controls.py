"""The explorer's controls and how they stand, and the HTML of what it shows."""

import base64
import io
from html import escape
from pathlib import Path

import ipywidgets
import numpy as np
from ipywidgets import Layout
from PIL import Image

from helpers.explorer.paint import Paint
from helpers.explorer.pictures import rgb
from helpers.explorer.record import STATISTICS
from helpers.explorer.search import REGION, State
from helpers.explorer.steered import SEEDS

FULL = {"width": "auto", "min_width": "0"}
VALUES = ("latent", "find", "sort", "prompt", "seed", "strength")  # shown as they are


def make(n_latents: int, grid: tuple[int, int], n_steps: int) -> dict[str, ipywidgets.Widget]:
    """All parts by name; those that hold a field of `State` have its name."""
    orders = [("best match first", ""), ("latent", "latent")]
    for name in (*STATISTICS, REGION):
        orders += [(f"{name}, largest first", f"-{name}"), (f"{name}, smallest first", name)]
    waits = {"continuous_update": False}
    entry = {"layout": Layout(**FULL), "style": {"description_width": "5rem"}}
    html = {"layout": Layout(**FULL)}
    hint = "index, label, name, word of the prompts, or: like 12"
    button = {"layout": Layout(width="auto")}
    return {
        "text": ipywidgets.Text(description="state", **waits, **entry),
        "message": ipywidgets.HTML(**html),
        "find": ipywidgets.Text(description="search", placeholder=hint, **waits, **entry),
        "sort": ipywidgets.Dropdown(options=orders, description="order", **entry),
        "columns": ipywidgets.HTML(**html),
        "list": ipywidgets.Select(rows=20, **html),
        "latent": ipywidgets.BoundedIntText(max=n_latents - 1, description="latent", **entry),
        "before": ipywidgets.Button(description="◀ previous", **button),
        "after": ipywidgets.Button(description="next ▶", **button),
        "like": ipywidgets.Button(description="like this one", **button),
        "page": ipywidgets.HTML(**html),
        "prompt": ipywidgets.Textarea(description="prompt", rows=2, **waits, **entry),
        "seed": ipywidgets.BoundedIntText(max=SEEDS, description="seed", **entry),
        "example": ipywidgets.Button(
            description="this latent's example",
            layout=Layout(width="auto", align_self="flex-start"),
        ),
        "strength": ipywidgets.FloatText(step=0.5, description="strength", **entry),
        "window": ipywidgets.IntRangeSlider(
            min=0, max=n_steps - 1, description="steps", **waits, **entry
        ),
        "paint": Paint(grid),
        "apply": ipywidgets.Button(description="Apply", button_style="primary", **button),
        "stop": ipywidgets.Button(description="Stop", disabled=True, **button),
        "bar": ipywidgets.IntProgress(max=2 * n_steps, layout=Layout(visibility="hidden", **FULL)),
        "pictures": ipywidgets.HTML(**html),
    }


def set_values(parts: dict, state: State, window: tuple[int, int]) -> None:
    """Let the controls stand as a state says."""
    for name in VALUES:
        parts[name].value = getattr(state, name)
    parts["paint"].mask = list(state.mask)
    parts["window"].value = window


def arranged(parts: dict) -> ipywidgets.VBox:
    """The parts in their places; columns stand below one another where there is little room."""

    def box(*names: str, **layout) -> ipywidgets.Box:
        return ipywidgets.Box([parts[n] for n in names], layout=Layout(min_width="0", **layout))

    column, line = {"flex_flow": "column"}, {"flex_flow": "row wrap", "align_items": "center"}
    found = ("find", "sort", "columns", "list", "latent")
    browse, act = box("before", "after", "like", **line), box("apply", "stop", **line)
    steer = [parts[n] for n in ("prompt", "seed", "example", "strength", "window")]
    steer = ipywidgets.Box([*steer, act, parts["bar"]], layout=Layout(flex="1 1 17rem", **column))
    search = ipywidgets.Box(
        [box(*found, **column), browse], layout=Layout(flex="1 1 16rem", **column)
    )
    rows = [
        [search, box("page", flex="2 1 24rem", **column)],
        [
            steer,
            box("paint", flex="1 1 14rem", **column),
            box("pictures", flex="2 1 20rem", **column),
        ],
    ]
    style = ipywidgets.HTML(f"<style>{Path(__file__).with_name('shell.css').read_text()}</style>")
    wrap = {"flex_flow": "row wrap", "grid_gap": "0.5rem 1.5rem", "align_items": "flex-start"}
    boxes = [ipywidgets.Box(row, layout=Layout(**wrap)) for row in rows]
    parts["list"].add_class("explorer-list")
    whole = ipywidgets.VBox([style, parts["text"], parts["message"], *boxes])
    return whole.add_class("explorer")


def sentence(text: str, wrong: bool) -> str:
    return f'<p role="{"alert" if wrong else "status"}">{escape(text)}</p>'


def columns(statistic: str) -> str:
    return f"<p>latent, name or label, {escape(statistic)}</p>"


def framed(page: str, title: str) -> str:
    """A whole HTML page within another one, whose style it does not touch."""
    return f'<iframe title="{escape(title)}" sandbox srcdoc="{escape(page)}"></iframe>'


def pair(plain: np.ndarray, steered: np.ndarray, state: State) -> str:
    """The plain image beside the steered one, (height, width, channels), and how it was made."""
    what = f"latent {state.latent}, strength {state.strength:g}"
    where = f", at {len(state.mask)} painted tokens" if state.mask else ", everywhere"
    told = (("plain", plain, "without steering"), (what, steered, f"steered along {what}{where}"))
    figures = "".join(
        f'<figure><img alt="“{escape(state.prompt)}”, {escape(alt)}" src="{_png(image)}">'
        f"<figcaption>{escape(name)}</figcaption></figure>"
        for name, image, alt in told
    )
    return f'<div class="pair">{figures}</div><p>Made as <code>{escape(str(state))}</code></p>'


def _png(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(rgb(image)).save(stream, "png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
