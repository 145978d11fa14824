"""The explorer in JupyterLab and the cards from disk, as a person uses them, in chromium."""

import re
from urllib.parse import parse_qs

import explored
import nbformat
import pytest
from browser import WAIT, chromium, jupyterlab, opened_browser
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from test_notebooks import TINY, run_here

from helpers.explorer import cards, records
from helpers.explorer.examples import Counts
from helpers.explorer.paint import HERE
from helpers.run.parameters import NOTEBOOKS

pytestmark = [pytest.mark.process, pytest.mark.browser]


@pytest.fixture(scope="module")
def browser():
    with opened_browser() as browser:
        yield browser


# --- cards ---


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """The index of three cards on disk."""
    run = explored.tiny_run(tmp_path_factory.mktemp("run"))
    counts = Counts(random=3, quantile=4, top=2, sample=6)
    return cards.write(records.build(run, counts=counts), [2, 5, 3], run.folder / "cards")[-1]


def test_cards_open_from_disk_without_a_network(browser, index):
    asked, wrong = [], []
    context = browser.new_context()
    context.set_offline(True)
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(error))
    page.goto(index.as_uri())
    rows = page.locator("tbody tr")
    assert rows.count() == 3
    page.get_by_role("searchbox").fill("word=red")
    assert rows.filter(visible=True).count() == 1
    rows.filter(visible=True).get_by_role("link").click()
    assert "word=red" in page.get_by_role("heading", level=1).inner_text()
    page.get_by_role("link", name="Next: latent 5").click()
    assert page.url.endswith("latent-5.html")
    broken = "images => images.filter(i => !i.complete || !i.naturalWidth).length"
    assert page.locator("img").count() > 3 and page.locator("img").evaluate_all(broken) == 0
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"} and len(asked) >= 3
    assert not wrong
    context.close()


@pytest.mark.parametrize("width", [1280, 420])
def test_cards_fit_their_window(browser, index, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    for name in ("index.html", "latent-2.html"):
        page.goto((index.parent / name).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


# --- the brush ---

MODEL = """mask => {
  const values = {rows: 2, columns: 4, mask, picture: null, height: 20, width: 40, told: "A cat"};
  const heard = [];
  window.sent = [];
  window.model = {
    get: name => values[name],
    set: (name, value) => { values[name] = value; heard.forEach(([n, f]) => n === name && f()); },
    save_changes: () => sent.push(values.mask),
    on: (event, f) => heard.push([event.replace("change:", ""), f]),
    off: () => {},
  };
  window.render({model, el: document.body});
}"""


@pytest.fixture
def brush(browser):
    """A page with a brush over 2 × 4 tokens: opens it with tokens painted."""
    context = browser.new_context(has_touch=True, viewport={"width": 420, "height": 600})
    page = context.new_page()
    script = (
        (HERE / "paint.js")
        .read_text()
        .replace("export default { render }", "window.render = render")
    )

    def opened(*mask):
        page.set_content("<!doctype html><title>brush</title>")
        page.add_style_tag(path=HERE / "paint.css")
        page.add_script_tag(content=script)
        page.evaluate(MODEL, list(mask))
        return page

    yield opened
    context.close()


def middle(page, token):
    """The middle of a token on the page."""
    box, (row, column) = page.locator("canvas").bounding_box(), divmod(token, 4)
    return box["x"] + (column + 0.5) * box["width"] / 4, box["y"] + (row + 0.5) * box["height"] / 2


def drag(page, *tokens):
    page.mouse.move(*middle(page, tokens[0]))
    page.mouse.down()
    for token in tokens[1:]:
        page.mouse.move(*middle(page, token))
    page.mouse.up()


def test_a_drag_paints_all_on_its_way_and_is_sent_once(brush):
    page = brush()
    drag(page, 0, 3, 7)
    assert page.evaluate("sent") == [[0, 1, 2, 3, 7]]
    page.get_by_role("button", name="Erase").click()
    drag(page, 1, 2)
    assert page.evaluate("sent[1]") == [0, 3, 7]
    assert page.get_by_role("status").inner_text() == "3 of 8 tokens painted"


def test_a_finger_paints(brush):
    page = brush()
    touch = page.context.new_cdp_session(page)
    for kind, token in (("touchStart", 4), ("touchMove", 5), ("touchMove", 6), ("touchEnd", None)):
        points = [] if token is None else [dict(zip("xy", middle(page, token)))]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    assert page.evaluate("sent") == [[4, 5, 6]]


def test_the_brush_answers_to_keys_and_says_where_it_is(brush):
    page = brush(5)
    page.locator("canvas").focus()
    for key in ("Space", "ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    said = page.get_by_role("status").inner_text()
    assert said == "Row 2 of 2, column 2 of 4, painted; 2 of 8 tokens painted"
    assert page.evaluate("sent") == [[0, 5]]
    label = page.get_by_role("application").get_attribute("aria-label")
    assert label.startswith("A cat, under a brush of 2 by 4 tokens. Arrow keys")


def test_a_wider_brush_paints_around_its_middle(brush):
    page = brush()
    page.get_by_role("slider", name="Brush").fill("2")
    page.mouse.click(*middle(page, 0))
    # one token is less than a brush of 2 away to the right and below, not across
    assert page.evaluate("sent") == [[0]]
    box = page.locator("canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.evaluate("sent[1]") == [0, 1, 2, 5, 6]


def test_clearing_inverting_and_what_the_kernel_sets(brush):
    page = brush(1, 2)
    page.get_by_role("button", name="Invert").click()
    page.get_by_role("button", name="Clear").click()
    assert page.evaluate("sent") == [[0, 3, 4, 5, 6, 7], []]
    assert page.get_by_role("status").inner_text() == "nothing painted: everywhere"
    page.evaluate("model.set('mask', [4])")
    assert page.get_by_role("status").inner_text() == "1 of 8 tokens painted"
    drag(page, 5, 6)
    assert page.evaluate("sent[2]") == [4, 5, 6]


# --- the explorer ---


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The notebook on a run of its own in JupyterLab; its address."""
    chromium()
    folder = tmp_path_factory.mktemp("lab")
    for notebook in ("01", "02", "03"):
        run_here(notebook, run=str(folder / "run"), **TINY[notebook])
    (path,) = NOTEBOOKS.glob("10_*.ipynb")
    given = {"run": str(folder / "run"), "example_strength": 0.0}
    notebook = parameterize_notebook(load_notebook_node(str(path)), given)
    nbformat.write(notebook, folder / path.name)
    with jupyterlab(folder) as address:
        yield address.format(path.name)


@pytest.fixture
def page(browser, lab):
    """The notebook after Run All, with the explorer in sight."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(WAIT)
    page.goto(lab)
    page.get_by_text(re.compile(r"\| Idle")).wait_for()  # the kernel is there
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".explorer canvas").wait_for()
    page.get_by_text("10_explorer.json written").wait_for(state="attached")
    page.locator(".explorer").scroll_into_view_if_needed()
    yield page
    page.close()


def control(page, name):
    return page.locator(".explorer").get_by_label(name, exact=True)


def state_of(page):
    return control(page, "state").input_value()


def until(page, condition, argument=None):
    page.wait_for_function(condition, arg=argument, timeout=WAIT)


def until_state(page, pattern):
    has = (
        "p => [...document.querySelectorAll('.explorer input')].some(i => RegExp(p).test(i.value))"
    )
    until(page, has, pattern)


def test_search_browse_paint_steer_and_reopen(page):
    # search, and browse by keyboard alone
    control(page, "search").fill("like 3")
    control(page, "search").press("Enter")
    until_state(page, "find=like")
    listed, first = page.locator(".explorer-list select"), state_of(page)
    names = listed.locator("option").all_inner_texts()
    assert len(names) > 1
    listed.focus()
    page.keyboard.press("ArrowDown")
    second = names[1].split()[0]
    until_state(page, f"latent={second}&")
    shown = page.frame_locator(".explorer iframe")
    shown.get_by_text(f"latent {second} of run").first.wait_for(timeout=WAIT)
    page.wait_for_timeout(1000)  # until all stands still, the brush too
    assert state_of(page) != first

    # paint by a drag over the upper row, in steps that skip tokens
    canvas = page.locator(".explorer canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    y = box["y"] + box["height"] / 8
    page.mouse.move(box["x"] + 0.1 * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], y, steps=2)
    assert "mask" not in state_of(page)
    page.mouse.up()
    until_state(page, "mask=0-3$")

    canvas.focus()
    for key in ("ArrowDown", "Space"):  # JupyterLab would go to the next cell
        page.keyboard.press(key)
    until_state(page, "mask=0-4$")

    # steer: nothing was made until Apply
    pictures = page.locator(".explorer .pair img")
    assert pictures.count() == 0
    control(page, "strength").fill("6")
    control(page, "strength").press("Enter")
    until_state(page, "strength=6.0")
    assert pictures.count() == 0
    page.locator(".explorer").get_by_role("button", name="Apply").click()
    pictures.nth(1).wait_for()
    plain, steered = pictures.evaluate_all("images => images.map(i => i.src)")
    assert plain != steered and plain.startswith("data:image/png")
    before = state_of(page)
    assert page.locator(".explorer code").inner_text() == before

    # another strength changes the steered picture, and not the plain one
    control(page, "strength").fill("-6")
    control(page, "strength").press("Enter")
    until_state(page, "strength=-6.0")
    page.locator(".explorer").get_by_role("button", name="Apply").click()
    until(page, "s => document.querySelectorAll('.explorer .pair img')[1].src !== s", steered)
    assert pictures.evaluate_all("images => images.map(i => i.src)")[0] == plain

    # a pasted state is shown again
    control(page, "state").fill(before)
    control(page, "state").press("Enter")
    until(
        page, "document.querySelector('.explorer input[type=number][step=\"0.5\"]').value === '6'"
    )
    assert parse_qs(state_of(page).rpartition("/")[2])["mask"] == ["0-4"]
