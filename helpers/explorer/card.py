"""One feature's record as one HTML file that needs nothing else: no network, no script."""

import base64
import io
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.explorer import pictures
from helpers.explorer.page import KINDS, SILENT, in_words, statistics
from helpers.explorer.record import STATISTICS, Examples, Record
from helpers.explorer.search import State

LIMIT = 400_000  # bytes of a card
SIZES = ((256, 85), (160, 82), (128, 78), (96, 72), (64, 60), (48, 45), (32, 30))  # width, quality
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
"""


def file_of(latent: int) -> str:
    return f"latent-{latent}.html"


def card(record: Record, written: list[int]) -> str:
    """The HTML of a record; `written` are the latents that have cards, to which it links, if any.

    Images are as large as fits into LIMIT bytes, and never larger than they were made.
    """
    for width, quality in SIZES:
        page = _page(reduced(record, width), written, partial(picture, quality=quality))
        if len(page.encode()) <= LIMIT:
            break
    return page


def head(title: str) -> str:
    style = Path(__file__).with_name("card.css").read_text()
    return HEAD.format(title=escape(title), style=style)


def reduced(record: Record, width: int) -> Record:
    """A record whose images are at most so many pixels wide."""
    examples = {
        kind: replace(own, pictures=narrowed(own.pictures, width))
        for kind, own in record.examples.items()
    }
    strip = record.strip
    if strip is not None:
        strip = strip._replace(images=narrowed(strip.images, width))
    return replace(record, examples=examples, strip=strip)


def narrowed(images: np.ndarray, width: int) -> np.ndarray:
    """Images (n, height, width, 3 or 1) in [0, 1], scaled down to at most so many pixels."""
    share = width / images.shape[2]
    if share >= 1 or not len(images):
        return images
    size = width, max(2, round(images.shape[1] * share))
    scale = Image.Resampling.LANCZOS
    small = [Image.fromarray(pictures.rgb(image)).resize(size, scale) for image in images]
    return np.stack(small).astype(np.float32) / 255


def picture(array: np.ndarray, alt: str, tile: int, quality: int) -> str:
    """An <img> of a picture (height, width, 3), bytes, in which one image is `tile` pixels wide."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "jpeg", quality=quality, subsampling=0)
    data = base64.b64encode(stream.getvalue()).decode()
    height, width = array.shape[:2]
    place = f'width="{width}" height="{height}"' + ' class="small"' * (tile < 100)
    return f'<img {place} alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">'


def _page(record: Record, written: list[int], img) -> str:
    run = Path(record.run).name  # a run may be given as a path, which is nobody else's business
    title = record.title or f"Latent {record.latent}"
    sections = [
        ("Statistics", _statistics(record)),
        ("Examples", _examples(record, img)),
        ("When and where", _over_time(record, img)),
        ("Effect and onset over steps", _lines(record)),
        ("Nearest features", _nearest(record, written)),
        ("Steered along it", _steered(record, img)),
    ]
    parts = [
        f'<section id="{name.split()[0].lower()}">\n<h2>{name}</h2>\n{body}\n</section>'
        for name, body in sections
        if body
    ]
    state = State(run, record.dictionary, record.latent)
    about = f"latent {record.latent} of {run}, {record.dictionary} dictionary"
    return "\n".join(
        [
            head(f"{title}, {about}") + _links(record, written),
            f'<main id="main">\n<h1>{escape(title)}</h1>\n<p class="note">{escape(about)}</p>',
            *parts,
            f"</main>\n<footer>{escape(str(state))}</footer>\n</body>\n</html>\n",
        ]
    )


def _links(record: Record, written: list[int]) -> str:
    if not written:
        return ""
    links = ['<a href="index.html">All features</a>']
    if record.latent in written:
        at = written.index(record.latent)
        for word, place in (("Previous", at - 1), ("Next", at + 1)):
            if 0 <= place < len(written):
                link = f'<a rel="{word[:4].lower()}" href="{file_of(written[place])}">'
                links.append(f"{link}{word}: latent {written[place]}</a>")
    return f'<nav aria-label="Cards">{" ".join(links)}</nav>'


def _statistics(record: Record) -> str:
    rows = [
        f'<div title="{escape(STATISTICS.get(name, ""))}">'
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in statistics(record).items()
    ]
    note = (
        '<p class="note">Onset and peak are denoising steps; by the onset a tenth of its evidence '
        "has come, at the peak the most. Brackets are 95 % intervals over images.</p>"
    )
    return f"<dl>\n{chr(10).join(rows)}\n</dl>\n{note}"


def _examples(record: Record, img) -> str:
    found = [
        '<p class="note">Each image above the map of where the latent is active: dark where it is '
        'silent <span class="bar magma" role="img" aria-label="from dark to bright"></span> '
        "bright at its largest code.</p>"
    ]
    for kind, own in record.examples.items():
        found.append(f"<h3>{KINDS[kind].capitalize()}</h3>")
        items = [_example(own, i, shown, img) for i, shown in enumerate(pictures.examples(own))]
        empty = f"<p>{SILENT.capitalize()}.</p>"
        found.append(f'<ul class="examples">\n{chr(10).join(items)}\n</ul>' if items else empty)
    return "\n".join(found)


def _example(own: Examples, i: int, shown: np.ndarray, img) -> str:
    number, prompt = int(own.images[i]), clipped(own.prompts[i])
    where = pictures.place(own.maps[i])
    alt = f"Image {number}" + (f", “{prompt}”" if prompt else "")
    alt += f"; most active at the {where}" if where else "; active alike everywhere"
    caption = f"{number}: code {own.codes[i]:.3g}"
    text = f'<span class="prompt">{escape(prompt)}</span>' if prompt else ""
    image = img(shown, alt, own.pictures.shape[2])
    return f"<li><figure>{image}<figcaption>{caption}{text}</figcaption></figure></li>"


def clipped(text: str, n: int = 160) -> str:
    """At most n characters of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= n else text[: n - 1] + "…"


def _over_time(record: Record, img) -> str:
    limit, items = pictures.limit_of(record.examples), []
    times = [record.timesteps[s] for s in pictures.shown_steps(len(record.steps))]
    for own in record.examples.values():
        for i, shown in enumerate(pictures.over_time(own, limit)):
            peak = np.maximum(own.evidence[i], 0).sum((1, 2)).argmax()
            alt = f"Image {own.images[i]} and its evidence at {len(times)} steps, "
            image = img(shown, alt + _most(record, peak), own.pictures.shape[2])
            caption = f"Image {own.images[i]}, then t = {', '.join(f'{t:.0f}' for t in times)}"
            items.append(f"<li><figure>{image}<figcaption>{caption}</figcaption></figure></li>")
    if not items:
        return ""
    return (
        '<p class="note">What each denoising step adds to the code, token by token: against it '
        '<span class="bar signed" role="img" aria-label="from blue to red"></span> '
        f"for it, from −{limit:.3g} to {limit:.3g}.</p>\n"
        f'<ul class="strips">\n{chr(10).join(items)}\n</ul>'
    )


def _most(record: Record, peak: int) -> str:
    return f"most at t = {record.timesteps[peak]:.0f}"


def _lines(record: Record) -> str:
    """A drawing of effect and onset, and a table of the same numbers."""
    rows = "\n".join(
        f"<tr><td>{step}</td><td>{t:.0f}</td><td>{share:.0%}</td><td>{u:.3g}</td><td>{w:.3g}</td></tr>"
        for step, t, share, u, w in zip(
            *(record.steps, record.timesteps, record.profile, record.effect, record.onset)
        )
    )
    names = ("step", "timestep", "share of evidence", "effect ‖u[s]‖", "onset ‖w[s]‖")
    header = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        f"{_drawing(record)}\n<details><summary>The numbers</summary>\n<table>\n"
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</details>"
    )


def _drawing(record: Record) -> str:
    width, height, left, bottom = 360, 150, 40, 28
    top = float(max(record.effect.max(), record.onset.max())) or 1.0
    x = np.linspace(left + 10, width - 10, len(record.steps))

    def line(values: np.ndarray, style: str) -> str:
        y = (height - bottom) - (height - bottom - 22) * np.asarray(values) / top
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
        return f'<polyline fill="none" stroke-width="2" {style} points="{points}"/>'

    solid, dashed = 'stroke="#0072B2"', 'stroke="#B34700" stroke-dasharray="5 3"'
    ticks = "".join(
        f'<text x="{x[s]:.1f}" y="{height - 14}" text-anchor="middle">'
        f"{record.timesteps[s]:.0f}</text>"
        for s in pictures.shown_steps(len(record.steps))
    )
    told = (
        f"Effect by timestep {_range(record.effect)}, largest at t = "
        f"{record.timesteps[int(record.effect.argmax())]:.0f}; onset {_range(record.onset)}, "
        f"largest at t = {record.timesteps[int(record.onset.argmax())]:.0f}."
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(told)}" font-size="10" font-family="system-ui, sans-serif" '
        f'fill="#1a1a1a">\n<path d="M{left} 18V{height - bottom}H{width}" fill="none" '
        f'stroke="#555"/>\n{line(record.effect, solid)}\n'
        f"{line(record.onset, dashed)}\n{ticks}\n"
        f'<text x="{left - 4}" y="26" text-anchor="end">{top:.2g}</text>'
        f'<text x="{left - 4}" y="{height - bottom}" text-anchor="end">0</text>'
        f'<text x="{width / 2}" y="{height - 2}" text-anchor="middle">timestep</text>\n'
        f'<path d="M{left + 8} 9h20" {solid} stroke-width="2"/>'
        f'<text x="{left + 32}" y="12">effect ‖u[s]‖</text>'
        f'<path d="M{left + 120} 9h20" {dashed} stroke-width="2"/>'
        f'<text x="{left + 144}" y="12">onset ‖w[s]‖, what is new</text>\n</svg>'
    )


def _range(values: np.ndarray) -> str:
    return f"from {values.min():.2g} to {values.max():.2g}"


def _nearest(record: Record, written: list[int]) -> str:
    lists = []
    for kind, near in record.nearest.items():
        items = []
        for n in near:
            text = f"latent {n.latent}" + (f", {escape(n.title)}" if n.title else "")
            if n.latent in written:
                text = f'<a href="{file_of(n.latent)}">{text}</a>'
            items.append(f"<li>{text}: {in_words('', n.similarity)}</li>")
        body = f"<ol>\n{chr(10).join(items)}\n</ol>" if items else "<p>None.</p>"
        lists.append(f"<div><h3>{kind.capitalize()}</h3>\n{body}</div>")
    note = '<p class="note">Cosine of their feature trajectories; overlap of where they fire.</p>'
    return f'{note}\n<div class="columns">\n{chr(10).join(lists)}\n</div>'


def _steered(record: Record, img) -> str:
    if record.strip is None:
        return ""
    items = []
    for strength, image in zip(record.strip.strengths, record.strip.images):
        alt = f"Steered by {strength:g}" if strength else "Not steered"
        shown = img(pictures.rgb(image), alt, image.shape[1])
        items.append(f"<li><figure>{shown}<figcaption>×{strength:g}</figcaption></figure></li>")
    prompt = f'<p class="note">“{escape(clipped(record.strip.prompt))}”</p>\n'
    body = f'<ul class="steered">\n{chr(10).join(items)}\n</ul>'
    return (prompt if record.strip.prompt else "") + body
