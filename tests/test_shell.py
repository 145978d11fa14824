import threading
from html import unescape

import explored
import numpy as np
import pytest
import torch
from conftest import SAMPLING, TOKENS

from helpers.explorer import records, shell
from helpers.explorer.examples import Counts
from helpers.explorer.search import State
from helpers.pipelines.generate import generate
from helpers.trajectories import Tap, record

COUNTS = Counts(random=2, quantile=2, top=2, sample=4)
PROMPTS = ["a red circle", "two cats", "a tree", "a red tree"]


class Store(explored.Store):
    """Four test images of the tiny pipeline, with 4×4 tokens and three kept steps."""

    steps, timesteps, grid, n_tokens = [0, 1, 2], [900.0, 500.0, 100.0], (4, 4), 16
    tap, sampling, seeds, prompts = Tap.of(TOKENS), SAMPLING, [5, 6, 7, 8], PROMPTS

    def __init__(self, pipe):
        self.pictures, self.h, _ = record(
            pipe, PROMPTS, self.seeds, self.tap, self.steps, **SAMPLING
        )
        self.read = []

    def n_images(self, split):
        return len(PROMPTS)

    def indices(self, split):
        return np.arange(len(PROMPTS))


@pytest.fixture(scope="module")
def found(pipe, tmp_path_factory):
    run = explored.tiny_run(tmp_path_factory.mktemp("run"), store=Store(pipe))
    return records.build(run, counts=COUNTS)


@pytest.fixture
def explorer(found, pipe):
    return shell.Explorer(found, lambda: pipe)


def message(explorer):
    return unescape(explorer.parts["message"].value)


def press(explorer, name):
    explorer.parts[name].click()
    explorer.wait()


def test_it_opens_on_the_best_latent_and_its_example_with_no_image_made(explorer, found):
    assert explorer.state.latent == explorer.results[0]
    assert explorer.state.prompt in PROMPTS and explorer.state.seed in Store.seeds
    number = Store.seeds.index(explorer.state.seed)
    assert PROMPTS[number] == explorer.state.prompt
    assert explorer.plain is explorer.steered is None
    assert explorer.parts["paint"].picture  # the recorded image, to paint on
    assert f"Latent {explorer.state.latent}" in explorer.parts["page"].value


def test_a_pasted_state_is_shown_by_every_control_and_comes_back(explorer):
    text = (
        "tiny/residual/latent=3&find=red&sort=-peak&prompt=a+dog&seed=9&strength=1.5"
        "&first=1&mask=0-2,7"
    )
    explorer.parts["text"].value = text
    parts = explorer.parts
    assert explorer.state == State.parse(text) and str(explorer.state) == text
    assert [parts[n].value for n in ("latent", "find", "sort")] == [3, "red", "-peak"]
    assert [parts[n].value for n in ("prompt", "seed", "strength")] == ["a dog", 9, 1.5]
    assert parts["window"].value == (1, 2) and parts["paint"].mask == [0, 1, 2, 7]
    assert not parts["paint"].picture  # no such image was recorded
    parts["strength"].value = -2.0
    parts["window"].value = (0, 1)
    assert parts["text"].value == text.replace("1.5&first=1", "-2.0&last=1")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tiny", "state is 'tiny'; it must be like"),
        ("other/residual/latent=1", "run is 'other'; it must be 'tiny', which is open here"),
        ("tiny/raw%20concat/latent=1", "dictionary is 'raw concat'; it must be 'residual'"),
        ("tiny/residual/latent=16", "latent is 16; it must be from 0 to 15"),
        ("tiny/residual/latent=1&mask=3,16", "mask is 16; it must be from 0 to 15"),
        ("tiny/residual/latent=1&seed=-1", "seed is -1; it must be from 0"),
        ("tiny/residual/latent=1&first=2&last=1", "windows is (2, 1); it must be pairs"),
        ("tiny/residual/latent=1&strength=1&last=3", "windows is (0, 3)"),
        ("tiny/residual/latent=1&find=like+99", "latent is 99; it must be from 0 to 15"),
        ("tiny/residual/latent=1&sort=-painted+share", "mask is (); it must be painted"),
    ],
)
def test_a_bad_state_changes_nothing_and_is_refused_in_a_sentence(explorer, text, told):
    before = explorer.state
    explorer.parts["text"].value = text
    assert 'role="alert"' in message(explorer) and told in message(explorer)
    assert explorer.parts["text"].value == text and explorer.state == before
    with pytest.raises(ValueError) as error:
        explorer.open(text)
    assert str(error.value).startswith(told) and "\n" not in str(error.value)


def test_searching_goes_to_the_first_found_and_browsing_on_from_there(explorer, found):
    explorer.parts["find"].value = "word=red"
    assert explorer.results == [2] and explorer.state.latent == 2
    explorer.parts["sort"].value = "-firing rate"
    explorer.parts["find"].value = ""
    rate = found.table["firing rate"]
    assert explorer.results[0] == rate.argmax() and len(explorer.results) == 16
    assert [i for _, i in explorer.parts["list"].options] == explorer.results
    press(explorer, "after")
    assert explorer.state.latent == explorer.results[1] == explorer.parts["list"].value
    explorer.parts["list"].value = explorer.results[5]
    press(explorer, "before")
    assert explorer.state.latent == explorer.results[4]
    assert f"Latent {explorer.results[4]}" in explorer.parts["page"].value


def test_like_this_one_finds_its_neighbours(explorer, found):
    explorer.change(latent=4)
    press(explorer, "like")
    near = {n.latent for own in found.near(4).values() for n in own}
    assert explorer.state.find == "like 4" and set(explorer.results) == near
    assert explorer.state.latent in near


def test_nothing_found_is_said_and_the_latent_stays(explorer):
    before = explorer.state.latent
    explorer.parts["find"].value = "zebra"
    assert explorer.results == [] and explorer.state.latent == before
    assert "No latent is found" in message(explorer)


def test_what_is_painted_orders_latents_by_where_they_live(explorer, found):
    explorer.parts["paint"].mask = [0, 1, 4, 5]
    explorer.parts["sort"].value = "-painted share"
    mean = found.array("mean_map")
    share = mean[:, [0, 1, 4, 5]].sum(1) / np.maximum(mean.sum(1), 1e-12)
    assert np.all(np.diff(share[explorer.results]) <= 0) and np.ptp(share) > 0
    explorer.parts["paint"].mask = []  # an order that there is not any more
    assert "it must be painted" in message(explorer) and explorer.parts["paint"].mask == [
        0,
        1,
        4,
        5,
    ]


def steered_by_hand(found, pipe, state, tokens, steps):
    """strength · RMS norm · û, added by a hook of our own; all of the model's steps were kept."""
    dictionary = found.run.dictionary
    u = dictionary.directions(state.latent)
    size = dictionary.coordinates.scale * u.shape[1] ** 0.5
    change = state.strength * size[:, None] * u / u.norm(dim=1).pow(2).mean().sqrt()
    where = torch.zeros(16, 1)
    where[tokens] = 1
    calls = []

    def add(module, _, output):
        calls.append(1)
        step, (negative, positive) = len(calls) - 1, output.chunk(2)
        if step in steps:
            return torch.cat([negative, positive + where * change[step]])

    hook = pipe.unet.get_submodule(TOKENS).register_forward_hook(add)
    try:
        return generate(pipe, [state.prompt], [state.seed], **SAMPLING)[0]
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("changes", "tokens", "steps"),
    [
        ({"first": 1}, list(range(16)), [1, 2]),
        ({"mask": (3, 9), "last": 1}, [3, 9], [0, 1]),
    ],
)
def test_apply_makes_the_plain_and_the_steered_image_of_the_state(
    explorer, found, pipe, no_hooks_left, changes, tokens, steps
):
    explorer.change(strength=3.0, **changes)
    press(explorer, "apply")
    assert "Done." in message(explorer)
    plain = generate(pipe, [explorer.state.prompt], [explorer.state.seed], **SAMPLING)[0]
    np.testing.assert_array_equal(explorer.plain, plain)
    expected = steered_by_hand(found, pipe, explorer.state, tokens, steps)
    np.testing.assert_allclose(explorer.steered, expected, atol=1e-4)
    assert abs(expected - plain).max() > 0.01
    shown = explorer.parts["pictures"].value
    assert shown.count("<img alt=") == 2 and unescape(shown).count(str(explorer.state)) == 1


def test_the_plain_image_of_a_prompt_and_seed_is_made_once(explorer, pipe):
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        explorer.change(strength=3.0)
        for strength, n in ((3.0, 6), (2.0, 9)):
            explorer.change(strength=strength)
            press(explorer, "apply")
            assert len(calls) == n
        explorer.change(seed=explorer.state.seed + 1)
        press(explorer, "apply")
    finally:
        hook.remove()
    assert len(calls) == 15


def test_only_apply_runs_the_model(found):
    loaded = []
    explorer = shell.Explorer(found, lambda: loaded.append(1))
    explorer.open("tiny/residual/latent=3&prompt=a+dog&strength=2&mask=1")
    explorer.parts["find"].value = "red"
    explorer.parts["paint"].mask = [4]
    press(explorer, "example")
    assert not loaded and explorer.steered is None
    explorer.change(strength=0.0)
    press(explorer, "apply")
    assert not loaded and "strength is 0; it must be another number" in message(explorer)


def test_stop_ends_after_the_present_step_and_leaves_what_was(
    explorer, pipe, monkeypatch, no_hooks_left
):
    explorer.change(strength=2.0)
    press(explorer, "apply")
    before, calls, reached, go = explorer.steered, [], threading.Event(), threading.Event()

    def slow(module, _, output):
        calls.append(1)
        reached.set()
        go.wait(20)

    hook = pipe.unet.get_submodule(TOKENS).register_forward_hook(slow)
    try:
        explorer.change(strength=4.0)
        explorer.parts["apply"].click()
        assert reached.wait(20) and explorer.running and explorer.parts["apply"].disabled
        explorer.apply()  # a second one while the first is at work is nothing
        explorer.parts["stop"].click()
        go.set()
        explorer.wait()
    finally:
        hook.remove()
    assert len(calls) == 1 and explorer.steered is before and not explorer.running
    assert "Stopped" in message(explorer) and not explorer.parts["apply"].disabled
    press(explorer, "apply")
    assert explorer.steered is not before


def test_what_goes_wrong_in_the_model_is_said_in_a_sentence(found):
    def load():
        raise OSError("the model cannot be read")

    explorer = shell.Explorer(found, load)
    explorer.change(strength=1.0)
    press(explorer, "apply")
    assert "the model cannot be read" in message(explorer)
    assert explorer.steered is None and explorer.parts["stop"].disabled


def test_prompts_and_names_are_shown_as_they_are_written(explorer):
    explorer.change(prompt='<b>"x"</b>', strength=1.0)
    press(explorer, "apply")
    shown = explorer.parts["pictures"].value
    assert "<b>" not in shown and 'alt="“&lt;b&gt;' in shown
