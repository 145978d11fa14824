import re
from html import unescape
from urllib.parse import unquote

import numpy as np
import pytest
from explored import tiny_run
from PIL import Image

from helpers.bundle import Bundle
from helpers.explorer import pictures, records
from helpers.explorer.card import LIMIT
from helpers.explorer.examples import Counts
from helpers.sharing import pages

SILENT = 7
REPORT = {
    "features": [{"latent": i, "what": f"word={i}", "auroc": [0.8, 0.7, 0.9]} for i in (5, 7, 2)]
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    run = tiny_run(tmp_path_factory.mktemp("run"))
    run.dictionary.coder.threshold[SILENT] = 1e9
    return records.build(run, counts=Counts(random=6, quantile=2, top=2, sample=6))


@pytest.fixture(scope="module")
def bundle(built):
    manifest = {"model": "tiny", "steps": [0, 3, 9], "channels": 4, "prompts": ["a secret"]}
    return Bundle(built.run.dictionary, manifest, REPORT, built)


@pytest.fixture(scope="module")
def saved(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "mine"
    bundle.save_pretrained(folder)
    return folder


def links(page):
    """What a Markdown or HTML file leads to or loads, but for other sites and its own parts."""
    text = re.sub(r"base64,[^\"]*", "", page.read_text())
    found = re.findall(
        r"\]\(([^)\s]+)\)" if page.suffix == ".md" else r'(?:href|src)="([^"]+)"', text
    )
    return [unquote(unescape(to)) for to in found if not re.match(r"https://|#|data:", to)]


def test_latents_that_fire_have_a_page_and_a_picture(saved, bundle):
    assert bundle.shown == [5, 2]
    names = {f"latent-{i}.{kind}" for i in (2, 5) for kind in ("html", "jpg")}
    assert {p.name for p in (saved / "features").iterdir()} == names | {"index.html"}
    said = (saved / "README.md").read_text()
    for latent in (2, 5):
        (row,) = [line for line in said.splitlines() if f"word={latent} " in line]
        assert f"[{latent}](features/latent-{latent}.html)" in row
        assert f"](features/latent-{latent}.jpg)" in row
    (silent,) = [line for line in said.splitlines() if f"word={SILENT} " in line]
    assert silent.startswith(f"| {SILENT} ") and "features/" not in silent


def test_every_link_leads_to_a_file_of_the_bundle(saved):
    texts = [saved / "README.md", *(saved / "features").glob("*.html")]
    found = {page.name: links(page) for page in texts}
    assert len(found["README.md"]) == 4 and "index.html" in found["latent-2.html"]
    for page in texts:
        for to in found[page.name]:
            assert (page.parent / to).resolve().is_relative_to(saved.resolve()), to
            assert (page.parent / to).is_file(), (page.name, to)


def test_pages_load_nothing_and_are_small(saved):
    for path in (saved / "features").iterdir():
        assert 0 < path.stat().st_size <= LIMIT, path.name
    for page in (saved / "features").glob("*.html"):
        text = re.sub(r"base64,[^\"]*", "", page.read_text())
        assert not re.search(r"https?:|//\w|@import|url\(|<(link|iframe|object|base)\b", text)
        assert not re.search(r"<script[^>]*\ssrc", text)
        sources = re.findall(r'<img[^>]*src="([^"]*)"', text)
        assert sources and all(s.startswith("data:image/jpeg;") for s in sources)


def test_a_picture_has_images_above_their_maps(built, saved):
    own = built.record(2).examples["random"]
    found = np.asarray(Image.open(saved / "features" / "latent-2.jpg")).astype(int)
    n, (height, width) = min(4, len(own.images)), own.pictures.shape[1:3]
    assert found.shape == (2 * height + 2, n * width + 2 * (n - 1), 3)
    expected = pictures.beside(*pictures.examples(own)[:n]).astype(int)
    assert abs(found - expected).mean() < 10 < 40 < abs(found - expected[:, ::-1]).mean()


def test_another_dictionarys_pages_and_card_are_not_left_behind(bundle, built, tmp_path):
    bundle.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "features" / "notes.txt").write_text("kept")
    report = {"features": [{"latent": 3, "what": "other", "auroc": None}]}
    again = Bundle(bundle.dictionary, bundle.manifest, report, built)
    again.save_pretrained(tmp_path / "mine")
    names = {p.name for p in (tmp_path / "mine" / "features").iterdir()}
    assert names == {"latent-3.html", "latent-3.jpg", "index.html", "notes.txt"}
    said = (tmp_path / "mine" / "README.md").read_text()
    assert "other" in said and "word=2" not in said


def test_no_prompt_goes_along_without_pages(bundle, tmp_path):
    Bundle(bundle.dictionary, bundle.manifest, REPORT).save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine" / "features").exists()
    said = (tmp_path / "mine" / "README.md").read_text()
    assert "word=2" in said and "features/" not in said


def test_large_images_are_made_small(built, tmp_path, monkeypatch):
    large = np.random.default_rng(0).random((12, 300, 200, 3)).astype(np.float32)
    monkeypatch.setattr(built.store, "pictures", large)
    pages.write(built, [2], tmp_path)
    width, height = Image.open(tmp_path / "latent-2.jpg").size
    assert (width, height) == (4 * 96 + 3 * 2, 2 * 144 + 2)
