"""Feature cards: one self-contained HTML file a feature, and an index of them with a search box.

    python -m helpers.explorer.cards demo                 # the twelve features to show first
    python -m helpers.explorer.cards demo --latents 3 17  # or --all

They open from disk, in any browser, without a network; what they show is read without a script.
"""

import argparse
import sys
from html import escape
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from helpers.checks import in_range
from helpers.explorer import pictures, records, search, strips
from helpers.explorer.card import LIMIT, card, clipped, file_of, head, narrowed, picture
from helpers.explorer.page import in_words
from helpers.files import check_writable, in_units, save_text

PICTURED = 200  # features of an index that has pictures: each takes about 3 kB
NAMED = "A name score is the AUC with which its name tells images in which it fires from others."
COLUMNS = ("firing rate", "L0 share", "onset", "peak", "label score")


def write(found: records.Records, latents, folder: str | Path) -> list[Path]:
    """Write the cards of some latents, in this order, and `index.html`; returns their paths.

    The same records give the same bytes. ValueError for a latent that there is not, OSError where
    nothing can be written, both before the first card.
    """
    folder, latents = Path(folder), [*dict.fromkeys(int(i) for i in latents)]
    for latent in latents:
        in_range("latent", latent, 0, found.n_latents - 1)
    check_writable(folder, "index.html", name="folder")
    most = in_units(LIMIT * len(latents))
    print(f"{len(latents)} cards, at most {most}, in {folder}")
    paths, rows = [], []
    for latent in tqdm(latents, "cards", unit="card", disable=None):
        record = found.record(latent)
        paths.append(folder / file_of(latent))
        save_text(paths[-1], card(record, latents))
        rows.append(_row(record, len(latents) <= PICTURED, _columns(found)))
    save_text(folder / "index.html", _index(found, rows))
    return [*paths, folder / "index.html"]


def _columns(found: records.Records) -> tuple[str, ...]:
    """Statistics in the index; how good names are only where there are any."""
    return COLUMNS + ("name score",) * bool(found.names)


def _row(record, pictured: bool, columns) -> str:
    """A feature's row in the index."""
    of_kind = record.examples.values()
    words = [record.title, *record.labels, *(p for own in of_kind for p in own.prompts)]
    text = f"{record.latent} " + " ".join(dict.fromkeys(clipped(w, 400) for w in words if w))
    link = f'<a href="{file_of(record.latent)}">{record.latent}</a>'
    cells = [f'<td data-value="{record.latent}">{link}</td>']
    if pictured:
        cells.insert(0, f"<td>{_thumbnail(record)}</td>")
    cells.append(f'<td class="text">{escape(record.title) or "–"}</td>')
    for name in columns:
        value = record.statistics[name]
        number = "" if np.isnan(value) else f"{value:.6g}"
        more = ' class="more"' if name in ("L0 share", "onset") else ""
        cells.append(f'<td{more} data-value="{number}">{in_words(name, value)}</td>')
    return f'<tr data-text="{escape(text.lower())}">{"".join(cells)}</tr>'


def _thumbnail(record) -> str:
    """The first random example, which the row's link describes."""
    own = record.examples["random"]
    if not len(own.images):
        return ""
    (image,) = narrowed(own.pictures[:1], 64)
    return picture(pictures.rgb(image), "", image.shape[1], 75)


def _index(found: records.Records, rows: list[str]) -> str:
    run = Path(found.run.name).name
    title = f"Features of {run}, {found.dictionary} dictionary"
    script = Path(__file__).with_name("index.js").read_text()
    sorted_by = [("latent", ""), ("name or label", ' class="text"')]
    sorted_by += [
        (name, ' class="more"' * (name in ("L0 share", "onset"))) for name in _columns(found)
    ]
    header = "".join(
        f'<th scope="col" data-sort="{"text" if "text" in kind else "number"}"{kind}>{name}</th>'
        for name, kind in sorted_by
    )
    if len(rows) <= PICTURED:
        header = f'<th scope="col">image</th>{header}'
    return (
        f'{head(title)}<main id="main">\n<h1>{escape(title)}</h1>\n'
        f'<p class="note">{found.n_latents} latents, {len(rows)} of them here. A label score is '
        "the AUROC for the label that a latent detects best; onset and peak are denoising steps."
        f"{' ' + NAMED if found.names else ''}</p>\n"
        '<p class="search" hidden><label for="search">Search by number, name, label or a word of '
        'the prompts</label><br><input type="search" id="search" autocomplete="off"> '
        '<span id="count" role="status"></span></p>\n'
        "<table>\n<caption>Each number leads to its card.</caption>\n"
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table>\n"
        f"</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m helpers.explorer.cards", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="a folder in runs/, or an absolute path")
    parser.add_argument("--dictionary", default="residual", help="or a baseline: 'raw concat'")
    parser.add_argument("--folder", type=Path, help="where to write; default: runs/<run>/cards")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--latents", type=int, nargs="+", metavar="LATENT")
    which.add_argument("--find", help="what to search for, such as 'red' or 'like 12'")
    which.add_argument("--all", action="store_true", help="every latent that fires")
    parser.add_argument("--steer", action="store_true", help="with images steered along each")
    given = parser.parse_args(arguments)
    try:
        found = records.build(open_run(given.run), given.dictionary)
        latents = _chosen(found, given)
        if given.steer:
            _steer(found, latents)
        paths = write(found, latents, given.folder or found.run.folder / "cards")
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"open {paths[-1]}")


def open_run(name: str):
    """A run by its name, to read from."""
    from helpers.run.methods import run_of  # here, because it imports all that notebooks need

    return run_of(name)


def _steer(found: records.Records, latents: list[int]) -> None:
    """Make the strips of steered images that are not there."""
    print(f"{len(latents) * len(strips.STRENGTHS)} images are steered, where they are not there")
    dictionary, pipe = records.dictionary_of(found.run, found.dictionary), found.run.pipeline()
    for latent in tqdm(latents, "steering", unit="latent", disable=None):
        strips.make(found, dictionary, pipe, latent)


def _chosen(found: records.Records, given) -> list[int]:
    if given.all:
        return np.flatnonzero(found.table["images"] > 0).tolist()
    if given.find is not None:
        return search.find(found, given.find)
    return given.latents or search.best(found)


if __name__ == "__main__":
    main()
