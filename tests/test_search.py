from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.explorer.record import STATISTICS, Name, Near
from helpers.explorer.search import SORTS, State, best, find, inside, numbers, ranges
from helpers.measure.metrics import Estimate

text = st.text("ab /&=%+#é“", max_size=6)
states = st.builds(
    State,
    run=text.filter(lambda t: t == t.strip() != ""),
    dictionary=text.filter(bool),
    latent=st.integers(0, 10**6),
    find=text,
    sort=st.sampled_from(["", *SORTS, *(f"-{s}" for s in SORTS)]),
    prompt=text,
    seed=st.integers(0, 2**40),
    strength=st.floats(allow_nan=False, allow_infinity=False),
    first=st.integers(0, 99),
    last=st.integers(-1, 99),
    mask=st.sets(st.integers(0, 300), max_size=20).map(sorted).map(tuple),
)


@given(states)
def test_a_state_comes_back_from_its_text(state):
    assert State.parse(str(state)) == state


def test_a_state_is_text_that_can_be_printed():
    assert str(State("demo", "residual", 12, sort="-peak")) == "demo/residual/latent=12&sort=-peak"
    state = State("demo", "raw concat", 3, find="colour=red", mask=(0, 1, 2, 7), strength=1.5)
    assert str(state) == "demo/raw%20concat/latent=3&find=colour=red&strength=1.5&mask=0-2,7"
    assert State.parse(" demo/residual/ ") == State()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("demo", "state is 'demo'; it must be like"),
        ("demo/residual", "state is"),
        ("demo/residual/latent=x", "latent is 'x'; it must be a number"),
        ("demo/residual/strength=nan", "strength is 'nan'; it must be finite"),
        ("demo/residual/latnet=1", "state's parameter is 'latnet'; it must be one of 'latent'"),
        ("demo/residual/sort=best", "sort is 'best'; it must be one of 'latent'"),
        ("demo/residual/mask=1-x", "mask is '1-x'; it must be numbers of tokens"),
    ],
)
def test_a_wrong_state_is_refused(wrong, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        State.parse(wrong)


def test_runs_of_numbers_are_written_by_their_ends():
    assert ranges((0, 1, 2, 5, 8, 9)) == "0-2,5,8-9" and ranges(()) == ""
    assert numbers("0-2,5,8-9") == (0, 1, 2, 5, 8, 9) and numbers("") == ()


def found():
    """Five latents on four images: what searching asks of records."""
    table = {name: np.full(5, np.nan) for name in STATISTICS}
    table["peak"] = np.array([3, 9, np.nan, 0, 3.0])
    table["firing rate"] = np.array([0.1, 0.2, 0, 0.1, 0.1])
    table["largest code"] = np.array([1.0, 1, 0, 3, 2])
    arrays = {
        "images": np.array([[0, 1], [2, 3], [-1, -1], [0, -1], [2, 1]]),
        "mean_map": np.array(
            [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [3, 1, 0, 0], [0, 0, 1, 1.0]]
        ),
        "effect": np.ones((5, 2)),
    }
    near = {
        1: {"by trajectory": [Near(4, 0.9, ""), Near(0, 0.5, "")], "by co-firing": [Near(4, 1, "")]}
    }
    return SimpleNamespace(
        n_latents=5,
        table=table,
        array=arrays.get,
        near=near.get,
        prompts=["a red cat", "A RED dog", "a dog", "blue"],
        labels={
            0: {"colour=red": Estimate(0.7, 0.6, 0.8)},
            3: {"colour=red": Estimate(0.9, 0.8, 0.95), "size=small": Estimate(0.6, 0.4, 0.8)},
        },
        names={1: Name("Red stripes")},
        store=SimpleNamespace(grid=(2, 2)),
    )


@pytest.mark.parametrize(
    ("query", "latents"),
    [
        ("", [0, 1, 2, 3, 4]),
        ("3", [3]),
        ("like 1", [4, 0]),
        ("colour=red", [3, 0]),
        ("RED", [1, 3, 0]),  # by name, then labels
        ("stripes", [1]),
        ("cat", [3, 0]),  # all and half of their examples; a quarter of all prompts
        ("dog", [4]),  # latent 1 has it in half of its examples, as all prompts do
        ("blue", [1]),
        ("nothing like it", []),
    ],
)
def test_latents_are_found_by(query, latents):
    assert find(found(), query) == latents


def test_a_statistic_orders_what_is_found():
    assert find(found(), sort="peak") == [3, 0, 4, 1, 2]
    assert find(found(), sort="-peak") == [1, 0, 4, 3, 2]
    assert find(found(), "colour=red", sort="-latent") == [3, 0]
    with pytest.raises(
        ValueError, match="sort is 'speed'; it must be one of 'latent', 'firing rate'"
    ):
        find(found(), sort="speed")


@pytest.mark.parametrize("query", ["5", "like 9"])
def test_a_latent_that_there_is_not_is_refused(query):
    with pytest.raises(ValueError, match="latent is .; it must be from 0 to 4"):
        find(found(), query)


def test_a_painted_region_finds_what_lives_there():
    left = np.array([[True, False], [True, False]])
    assert inside(found(), left).tolist() == [0.5, 0, 0, 0.75, 0.5]
    assert find(found(), "colour=red", "-painted share", left) == [3, 0]
    assert find(found(), sort="-painted share", region=left) == [3, 0, 4, 1, 2]
    assert find(found(), sort="painted share", region=left) == [1, 2, 0, 4, 3]
    for nothing in (None, ~left & left):
        with pytest.raises(ValueError, match="mask is .*painted where the order is by"):
            find(found(), sort="painted share", region=nothing)
    with pytest.raises(
        ValueError, match=r"region is \(1, 4\); it must be of the token grid, \(2, 2\)"
    ):
        inside(found(), left.reshape(1, 4))


def test_the_best_are_those_of_each_label_then_those_that_do_most():
    # latent 3 is best for red; for small the interval holds a half; then 0.1·2, 0.2·1, 0.1·1
    assert best(found()) == [3, 1, 4, 0]
    assert best(found(), 2) == [3, 1]
