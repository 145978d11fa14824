"""What a shared dictionary shows of its best features: a page of each, and a picture of each.

The hub shows Markdown and images, but no HTML: a model card has the pictures and links to pages.
"""

import io
from dataclasses import replace
from pathlib import Path

from PIL import Image

from helpers.explorer import cards, pictures
from helpers.explorer.card import narrowed
from helpers.explorer.records import Records
from helpers.files import save_bytes

N_SHOWN, WIDTH = 4, 96  # images in a picture, and how many pixels each is wide at most


def write(records: Records, latents: list[int], folder: str | Path) -> None:
    """Write `latent-<i>.html` and `latent-<i>.jpg` of each latent, and `index.html`.

    A picture has random images in which the latent, which must fire in some, is active, each above
    the map of where. Those of other latents that stood there are removed. OSError where nothing can
    be written.
    """
    folder = Path(folder)
    for old in (*folder.glob("latent-*.html"), *folder.glob("latent-*.jpg")):
        old.unlink()
    for latent, page in zip(latents, cards.write(records, latents, folder)):
        own = records.record(latent).examples["random"]
        small = replace(own, pictures=narrowed(own.pictures[:N_SHOWN], WIDTH))
        stream = io.BytesIO()
        Image.fromarray(pictures.beside(*pictures.examples(small))).save(
            stream, "jpeg", quality=90, subsampling=0
        )
        save_bytes(page.with_suffix(".jpg"), stream.getvalue())
