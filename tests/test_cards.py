import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from explored import tiny_run

from helpers.explorer import cards, records
from helpers.explorer.card import LIMIT, card, clipped, narrowed
from helpers.explorer.examples import Counts
from helpers.explorer.record import Examples, Name, Strip
from helpers.measure.metrics import Estimate

COMMITTED = Path(__file__).parents[1] / "figures" / "demo" / "cards"
COUNTS = Counts(random=3, quantile=4, top=2, sample=6)
VOID = {"meta", "img", "br", "input", "path", "polyline"}


class Page(HTMLParser):
    """What a page is made of; fails where an element is not closed by its own end."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, *tags):
        return [attrs for tag, attrs in self.tags if tag in tags]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    run = tiny_run(tmp_path_factory.mktemp("run"))
    run.store.prompts = [f"{p}, <b>& co</b>" for p in run.store.prompts]
    run.dictionary.coder.threshold[7] = 1e9
    return records.build(run, counts=COUNTS)


@pytest.fixture(scope="module")
def written(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    cards.write(built, [2, 7, 5, 2], folder)
    return folder


def test_a_card_and_an_index_are_written_for_each_latent_once(built, written, tmp_path):
    names = ["index.html", "latent-2.html", "latent-5.html", "latent-7.html"]
    assert sorted(p.name for p in written.iterdir()) == names
    again = cards.write(built, [2, 7, 5], tmp_path / "new")
    assert [p.name for p in again] == ["latent-2.html", "latent-7.html", "latent-5.html", names[0]]
    for path in again:
        assert path.read_bytes() == (written / path.name).read_bytes()


def test_the_index_says_how_good_names_are_where_there_are_any(tmp_path):
    run = tiny_run(tmp_path / "run")
    records.build(run, counts=COUNTS)
    for names in ({}, {2: Name("stripes", Estimate(0.8, 0.7, 0.9)), 5: Name("dots")}):
        records.save_names(run, "residual", names)
        cards.write(records.load(run), [2, 5, 7], tmp_path)
        text = (tmp_path / "index.html").read_text()
        assert ("name score" in text) == ("A name score is the AUC" in text) == bool(names)
    assert '<td data-value="0.8">0.800</td>' in text and "stripes" in text and "dots" in text
    assert "0.800 [0.700, 0.900]" in (tmp_path / "latent-2.html").read_text()


@pytest.mark.parametrize("name", ["index.html", "latent-2.html", "latent-7.html"])
def test_pages_need_nothing_from_elsewhere(written, name):
    needs_nothing(written / name)


def test_the_committed_cards_need_nothing_from_elsewhere():
    pages = sorted(COMMITTED.iterdir())
    assert len(pages) == 13 and pages[0].name == "index.html"
    for path in pages:
        needs_nothing(path)
        assert path.stat().st_size <= LIMIT


def needs_nothing(path):
    name, text = path.name, path.read_text()
    page = Page(text)
    bare = re.sub(r"base64,[^\"]*", "", text)
    assert not re.search(r"https?:|//\w|@import|url\(", bare) and len(bare) < 40_000
    links = [a["href"] for a in page.all("a")]
    assert all((path.parent / link).exists() for link in links if not link.startswith("#"))
    assert all(i["src"].startswith("data:image/jpeg;base64,") for i in page.all("img"))
    assert not page.all("link", "iframe", "object") and (name == "index.html") == (
        "script" in [tag for tag, _ in page.tags]
    )


def test_a_card_is_told_to_those_who_cannot_see_it(built, written):
    page, record = Page((written / "latent-2.html").read_text()), built.record(2)
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1", "main", "nav")) == 3
    images = page.all("img")
    n = sum(len(own.images) + len(own.evidence) for own in record.examples.values())
    assert len(images) == n > 4 and all(len(i["alt"]) > 10 for i in images)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    (drawing,) = page.all("svg")
    assert drawing["role"] == "img" and "largest at t = " in drawing["aria-label"]


def test_a_card_says_what_the_record_says(built, written):
    page, record = Page((written / "latent-2.html").read_text()), built.record(2)
    order = ["Statistics", "Examples", "Random images", "strongest images", "When and where"]
    order += ["Effect and onset", "Nearest features", "tiny/residual/latent=2"]
    at = [page.text.index(t) for t in order]
    assert at == sorted(at) and "Steered" not in page.text
    assert str(record.labels["word=red"]) in page.text and record.title in page.text
    assert f"{record.effect[1]:.3g}" in page.text
    assert record.examples["top"].prompts[0] in page.text  # as it was written, its < and & too
    assert "<b>" not in (written / "latent-2.html").read_text()


def test_cards_lead_to_one_another(written):
    page = Page((written / "latent-7.html").read_text())
    links = {a.get("rel", ""): a["href"] for a in page.all("a")}
    assert links["prev"] == "latent-2.html" and links["next"] == "latent-5.html"
    assert "It fires in none of these images." in page.text


def test_a_card_that_stands_alone_leads_nowhere(built):
    page = Page(card(built.record(2), []))
    assert not page.all("nav") and page.all("a") == [{"class": "skip", "href": "#main"}]


def test_the_index_can_be_searched_and_read_without_a_script(built, written):
    page = Page((written / "index.html").read_text())
    rows = page.all("tr")[1:]
    assert [int(re.match(r"\d+", row["data-text"])[0]) for row in rows] == [2, 7, 5]
    assert "word=red" in rows[0]["data-text"] and "cat" in rows[0]["data-text"]
    (box,) = page.all("input")
    assert box["type"] == "search" and page.all("label") == [{"for": box["id"]}]
    assert all(head["scope"] == "col" for head in page.all("th"))


def test_a_name_and_a_strip_are_on_the_card(built):
    strip = Strip(np.array([-1, 0, 2.5]), np.zeros((3, 6, 7, 3)), "a <cat>")
    page = Page(card(replace(built.record(2), name=Name("<warm>"), strip=strip), [2]))
    assert "<warm>" in page.text and "“a <cat>”" in page.text and "×2.5" in page.text
    assert [i["alt"] for i in page.all("img")][-3:] == [
        "Steered by -1",
        "Not steered",
        "Steered by 2.5",
    ]


def test_large_noisy_images_are_made_small_enough(built):
    rng = np.random.default_rng(0)
    noise = rng.random((8, 90, 120, 3)).astype(np.float32)
    maps, evidence = rng.random((8, 16, 16)), rng.normal(size=(2, 3, 16, 16))
    own = Examples(np.arange(8), np.ones(8), ["a long prompt " * 30] * 8, noise, maps, evidence)
    text = card(replace(built.record(2), examples={"random": own, "quantile": own, "top": own}), [])
    assert 50_000 < len(text.encode()) <= LIMIT
    widths = [int(i["width"]) for i in Page(text).all("img")]
    assert min(widths) >= 32
    assert "a long prompt " * 30 not in text and clipped("a  b\n" * 99, 6) == "a b a…"


def test_images_are_narrowed_in_proportion_and_never_widened():
    images = np.full((2, 30, 60, 1), 0.25, np.float32)
    found = narrowed(images, 20)
    assert found.shape == (2, 10, 20, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, 0.25, atol=1 / 255)
    assert narrowed(images, 60) is images and narrowed(images[:0], 20).shape == (0, 30, 60, 1)


def test_nothing_is_written_of_latents_that_there_are_not(built, tmp_path):
    with pytest.raises(ValueError, match="latent is 99; it must be from 0 to 15"):
        cards.write(built, [2, 99], tmp_path / "cards")
    assert not (tmp_path / "cards").exists()


def test_the_command_writes_the_best_the_named_or_those_found(built, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cards, "open_run", lambda name: built.run)
    monkeypatch.setattr(records, "build", lambda run, dictionary: built)
    folder = tmp_path / "c"

    def made(*arguments):
        cards.main(["tiny", "--folder", str(folder), *arguments])
        rows = Page((folder / "index.html").read_text()).all("tr")[1:]
        return [int(row["data-text"].split()[0]) for row in rows]

    assert made("--latents", "5", "3") == [5, 3]
    assert made("--find", "word=red") == [2]
    assert 7 not in made("--all") and len(made()) == 12
    assert capsys.readouterr().out.endswith(f"open {folder / 'index.html'}\n")
    with pytest.raises(SystemExit, match="error: latent is 99"):
        made("--latents", "99")
