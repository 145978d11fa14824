import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SAMPLING, TOKENS, some_predictors
from encoders import encoder

from helpers import coordinates, dictionary, sae, steering
from helpers.hooks import Tap
from helpers.measure import transport
from helpers.measure.lpips import LPIPS
from helpers.pipelines.generate import generate
from helpers.trajectories import record

LIST = Path(__file__).with_name("riebench_cases.json")
LARGER = SAMPLING | {"height": 32, "width": 32}  # LPIPS needs 31 pixels
STORE = SimpleNamespace(tap=Tap(TOKENS), steps=[0, 2], grid=(8, 8), sampling=LARGER)
LEFT = np.arange(32)[None] < np.full((32, 1), 12)  # what a segmenter finds: the left 12 columns


def segment(image, text, name):
    """Everything is at the left, and 'nowhere' is not to be found."""
    return LEFT & (text != "nowhere")


@pytest.fixture(scope="module")
def bench(pipe):
    torch.manual_seed(0)
    predictors = some_predictors(2, 32)
    found = {}
    for name, c in (
        ("residual concat", coordinates.residual(predictors)),
        ("raw", coordinates.raw(predictors)),
    ):
        found[name] = dictionary.Dictionary(name, c, sae.SAE(64, 24, 6))
    judges = encoder("clip"), LPIPS(), segment
    return transport.Bench(pipe, STORE, found, *judges, 42, 3, ["score", "random"], [2.0, 0.5])


@pytest.fixture(scope="module")
def cases():
    return {case.name: case for case in transport.read_cases(str(LIST), 50)}


# --- the list ---


def test_brackets_are_taken_out_of_both_prompts(cases):
    assert len(cases) == 9 and [c.kind for c in cases.values()] == list(transport.KINDS)
    assert cases["c2"] == transport.Case(
        *("c2", "add object", "a table", "a table with a lamp", "table", "lamp")
    )
    assert not any(set("[]") & set(c.original + c.edited) for c in cases.values())


def test_as_many_of_each_type_as_wanted_are_taken(tmp_path):
    given = json.loads(LIST.read_text())
    (tmp_path / "c.json").write_text(json.dumps(given + [e | {"id": "again"} for e in given[:3]]))
    assert len(transport.read_cases(str(tmp_path / "c.json"), 1)) == 9
    assert len(transport.read_cases(str(tmp_path / "c.json"), 2)) == 12


@pytest.mark.parametrize(
    "change, words",
    [
        ({"editing_type_id": "0"}, "editing_type_id is '0'.*'1', '2'"),
        ({"editing_gsam_prompt": None}, "cases: c1 is .*with editing_gsam_prompt"),
    ],
)
def test_a_case_that_lacks_something_is_named(tmp_path, change, words):
    entry = json.loads(LIST.read_text())[0] | change
    entry = {name: value for name, value in entry.items() if value is not None}
    (tmp_path / "c.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=words):
        transport.read_cases(str(tmp_path / "c.json"), 50)
    with pytest.raises(ValueError, match="cases is 'none.json'.*wendlerc"):
        transport.read_cases("none.json", 50)


# --- which latents, and where ---


def test_latents_are_chosen_by_their_share_here_less_that_there():
    new = torch.tensor([[4.0, 0, 2, 0, 0], [2, 0, 0, 2, 0]])  # shares .6 0 .2 .2 0
    old = torch.tensor([[0.0, 3, 0, 0, 5], [0, 0, 2, 0, 0]])  # shares 0 .3 .2 0 .5
    added, taken = transport.choose(new, old, 2, "score", None)
    assert added.tolist() == [0, 3] and sorted(taken.tolist()) == [1, 4]


def test_the_control_takes_as_many_that_are_active_at_random():
    new, old = torch.eye(6)[:3], torch.eye(6)[2:]
    drawn = [
        transport.choose(new, old, 2, "random", np.random.default_rng(seed)) for seed in range(30)
    ]
    assert all(len(added) == len(taken) == 2 for added, taken in drawn)
    assert set(torch.stack([a for a, _ in drawn]).flatten().tolist()) == {0, 1, 2}
    assert set(torch.stack([t for _, t in drawn]).flatten().tolist()) == {2, 3, 4, 5}
    with pytest.raises(ValueError, match="no latent is active"):
        transport.choose(new, 0 * old, 2, "score", None)


def test_codes_are_moved_between_regions_as_the_kind_of_edit_says(cases):
    z = torch.arange(12.0).reshape(2, 3, 2) + 1  # (edited, original), token, latent
    regions = np.array([True, True, False]), np.array([False, True, True])
    new, old = transport.sources(cases["c1"], z, regions)
    assert new.tolist() == [[1, 2], [3, 4], [0, 0]] and old.tolist() == [[0, 0], [9, 10], [11, 12]]
    there = np.array([False, False, True])
    new, old = transport.sources(cases["c3"], z, (~there, there))
    assert new.tolist() == [[0, 0], [0, 0], [8, 9]] and old.tolist() == [[0, 0], [0, 0], [11, 12]]


def test_regions_are_tokens_that_the_thing_found_covers(bench, cases):
    image = np.zeros((32, 32, 3), np.float32)
    at_left = np.tile(np.arange(8) < 3, 8)
    new, old = transport._regions(bench, cases["c1"], image, image)
    assert new.tolist() == old.tolist() == at_left.tolist()
    new, old = transport._regions(bench, cases["c3"], image, image)
    assert new.tolist() == (~at_left).tolist() and old.tolist() == at_left.tolist()
    new, _ = transport._regions(bench, cases["c8"], image, image)
    assert new.tolist() == (~at_left).tolist()  # all but the foreground
    assert np.all(transport._regions(bench, cases["c9"], image, image))


# --- edits ---


def by_hand(bench, case, name, added, taken, strength):
    """What is added, (kept step, token, channel), in loops."""
    own = bench.dictionaries[name]
    _, h, _ = record(bench.pipe, [case.edited, case.original], [42, 42], TOKENS, [0, 2], **LARGER)
    z = own.codes(own.coordinates.standardise(h.transpose(1, 2)))
    at_left = np.tile(np.arange(8) < 3, 8)
    out = torch.zeros(2, 64, 32)
    for s in range(2):
        for token in np.flatnonzero(at_left):
            for sign, image, latents in ((1, 0, added), (-1, 1, taken)):
                for j in latents:
                    u = own.directions(j)[s] * own.coordinates.scale[s]
                    out[s, token] += sign * strength * z[image, token, j] * u
    return out


def test_an_edit_is_what_moving_the_chosen_codes_makes(bench, cases, monkeypatch):
    case, chosen = cases["c1"], []
    choose = transport.choose
    monkeypatch.setattr(transport, "choose", lambda *a: chosen.append(choose(*a)) or chosen[-1])
    found = transport.scores(bench, case)
    ways = [
        f"{n}, {c}, ×{s:g}" for n in bench.dictionaries for c in bench.choices for s in (2, 0.5)
    ]
    assert list(found) == [*ways, "edited prompt"]
    added, taken = (latents.tolist() for latents in chosen[0])
    delta = by_hand(bench, case, "residual concat", added, taken, 2.0)
    delta = steering.at_every_step(delta, [0, 2], 3)[:, None]
    edited, original = generate(bench.pipe, [case.edited, case.original], [42, 42], **LARGER)
    made = steering.steer(bench.pipe, [case.original], [42], STORE.tap, delta, **LARGER)[0]
    assert abs(made - original).max() > 1e-3
    x = bench.encoder.images(np.stack([made, original, edited])).numpy()
    t = bench.encoder.texts([case.edited, case.original]).numpy()
    expected = {
        "CLIP-T to edited": x[0] @ t[0],
        "CLIP-T to original": x[0] @ t[1],
        "CLIP-I to edited": x[0] @ x[2],
        "CLIP-I to original": x[0] @ x[1],
        "ΔCLIP-T": x[0] @ t[0] - x[1] @ t[0],
        "LPIPS to edited": bench.lpips(made[None], edited[None])[0],
        "LPIPS to original": bench.lpips(made[None], original[None])[0],
    }
    assert found["residual concat, score, ×2"] == pytest.approx(expected, abs=2e-4)
    oracle = found["edited prompt"]
    assert oracle["LPIPS to edited"] == pytest.approx(0, abs=1e-6)
    assert oracle["CLIP-I to edited"] == pytest.approx(1, abs=1e-5)
    assert oracle["ΔCLIP-T"] == pytest.approx(x[2] @ t[0] - x[1] @ t[0], abs=1e-4)


@pytest.mark.parametrize("name", ["c2", "c3", "c8"])
def test_next_to_nothing_moved_changes_next_to_nothing(bench, cases, name, monkeypatch):
    monkeypatch.setattr(bench, "strengths", [1e-7])
    found = transport.scores(bench, cases[name])
    for way in set(found) - {"edited prompt"}:
        assert found[way]["LPIPS to original"] == pytest.approx(0, abs=1e-4)
        assert found[way]["ΔCLIP-T"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "name, words", [("c7", "nothing of 'nowhere' is found"), ("c9", "both prompts are the same")]
)
def test_a_case_that_cannot_be_says_why(bench, cases, name, words):
    with pytest.raises(ValueError, match=words):
        transport.scores(bench, cases[name])


def test_without_masks_an_edit_is_everywhere_and_nothing_can_be_deleted(bench, cases, monkeypatch):
    monkeypatch.setattr(bench, "segment", None)
    image = np.zeros((32, 32, 3), np.float32)
    assert np.all(transport._regions(bench, cases["c1"], image, image))
    with pytest.raises(ValueError, match="all of the image"):
        transport.scores(bench, cases["c3"])
