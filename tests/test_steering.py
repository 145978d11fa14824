import numpy as np
import pytest
import torch
from conftest import GRID, SAMPLING, TOKENS, TUPLE, built, hooks_on, some_predictors
from hypothesis import given
from hypothesis import strategies as st

from helpers import steering, trajectories

N, CHANNELS, N_TOKENS = SAMPLING["num_inference_steps"], 32, 16
SEEDS = [3, 4]


@pytest.fixture
def steer(pipe, prompts):
    def run(delta, hookpoint=TOKENS, **changes):
        return steering.steer(pipe, prompts[:2], SEEDS, hookpoint, delta, **SAMPLING | changes)

    return run


@pytest.fixture(scope="module")
def plain(pipe, prompts):
    return trajectories.generate(pipe, prompts[:2], SEEDS, **SAMPLING)


@pytest.fixture
def delta():
    return 3 * torch.randn(N, CHANNELS, generator=torch.Generator().manual_seed(0))


# --- directions ---------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), size=st.floats(1e-3, 1e3))
def test_a_unit_trajectory_has_rms_norm_one_and_keeps_its_profile(seed, size):
    u = size * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    unit = steering.unit(u)
    assert unit.norm(dim=1).pow(2).mean().sqrt() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(unit / unit.norm(), u / u.norm())


def test_a_direction_of_zeros_is_refused():
    with pytest.raises(ValueError, match="zero at every step"):
        steering.unit(torch.zeros(3, 4))


def test_a_random_control_has_the_same_norm_at_every_step():
    u = torch.randn(5, 8) * torch.tensor([0.0, 1, 2, 3, 4])[:, None]
    control = steering.random_like(u, 0)
    torch.testing.assert_close(control.norm(dim=1), u.norm(dim=1))
    assert torch.equal(control, steering.random_like(u, 0))
    assert not torch.equal(control, steering.random_like(u, 1))
    assert abs(torch.nn.functional.cosine_similarity(control[1:], u[1:])).max() < 0.99


@given(seed=st.integers(0, 1000))
def test_what_each_step_adds_is_rho_times_the_decoder_row(seed):
    p = some_predictors(seed=seed)
    w = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
    new = steering.only_new(p.feature_trajectories(w)[0], p)
    torch.testing.assert_close(new, p.rho[:, None] * w.view(3, 4), rtol=1e-4, atol=1e-4)


def test_an_addition_worked_by_hand():
    p = some_predictors(2, 4)
    p.scale = torch.tensor([2.0, 6.0])
    u = torch.tensor([[3.0, 0, 0, 0], [0, 4.0, 0, 0]])  # RMS norm over steps √((9 + 16) / 2)
    added = steering.addition(u, p, [1, 3], 5, strength=0.5)
    unit = 12.5**0.5
    first, last = 0.5 * 2 * 2 * 3 / unit, 0.5 * 6 * 2 * 4 / unit  # strength · scale · √4 · u / RMS
    expected = [[first, 0], [first, 0], [first / 2, last / 2], [0, last], [0, last]]
    torch.testing.assert_close(added[:, :2], torch.tensor(expected))
    assert added.shape == (5, 4) and not added[:, 2:].any()


@pytest.mark.parametrize("factor, times", [(0, -1), (1, 0), (2, 1), (0.5, -0.5)])
def test_scaling_adds_a_multiple_of_what_the_image_has(factor, times):
    p = some_predictors(3, 4)
    u = torch.randn(3, 4)
    codes = torch.tensor([[0.0, 2.0], [1.0, 0.5]])
    change = steering.scaling(codes, u, p, [0, 1, 2], 3, factor)
    assert change.shape == (3, 2, 2, 4)
    for s in range(3):
        for i in range(2):
            for t in range(2):
                torch.testing.assert_close(change[s, i, t], times * codes[i, t] * p.scale[s] * u[s])


@pytest.mark.parametrize(
    "window", [(-1, 2), (2, 1), (0, 4), (4, 4), [0], [0, 1, 2], 5, [0, 1.5], "01", []]
)
def test_a_window_outside_the_steps_is_refused(window):
    with pytest.raises(
        ValueError, match="windows holds .*; each is two steps, first and last, from 0 to 3"
    ):
        steering.check_window(window, 4)


def test_a_window_inside_the_steps_is_taken():
    assert steering.check_window([0, 3], 4) == (0, 3) and steering.check_window((2, 2), 4) == (2, 2)


# --- steering images ----------------------------------------------------------------------------

HOOKPOINTS = pytest.mark.parametrize("hookpoint", [TOKENS, TUPLE, GRID])


@HOOKPOINTS
def test_steering_by_nothing_gives_the_same_image_bit_for_bit(steer, plain, hookpoint):
    assert np.array_equal(steer(torch.zeros(N, CHANNELS), hookpoint), plain)
    assert np.array_equal(steer(torch.zeros(N, 2, N_TOKENS, CHANNELS), hookpoint), plain)


@HOOKPOINTS
def test_a_mask_of_zeros_gives_the_same_image_bit_for_bit(steer, plain, delta, hookpoint):
    assert np.array_equal(steer(delta, hookpoint, mask=torch.zeros(N_TOKENS)), plain)
    assert np.array_equal(steer(delta, hookpoint, mask=torch.zeros(2, N_TOKENS)), plain)


@HOOKPOINTS
def test_steering_changes_images(steer, plain, delta, hookpoint):
    changed = steer(delta, hookpoint)
    assert changed.shape == plain.shape and changed.dtype == np.float32
    assert all(abs(a - b).max() > 1e-3 for a, b in zip(changed, plain))


def test_an_image_whose_mask_is_zero_stays_as_it_is(steer, plain, delta):
    mask = torch.stack([torch.zeros(N_TOKENS), torch.ones(N_TOKENS)])
    changed = steer(delta, mask=mask)
    assert np.array_equal(changed[0], plain[0]) and not np.array_equal(changed[1], plain[1])


def test_a_delta_for_every_image_and_token_equals_the_same_one_for_all(steer, delta):
    per_token = delta[:, None, None].expand(N, 2, N_TOKENS, CHANNELS)
    assert np.array_equal(steer(per_token), steer(delta))


def test_the_same_steering_gives_the_same_image(steer, delta):
    assert np.array_equal(steer(delta), steer(delta))


@pytest.fixture
def overheard(pipe):
    """Inputs of the U-Net, (step, row, channel, height, width), and its outputs, while `run()` goes on."""

    def listen(run):
        samples, outputs = [], []
        handles = [
            pipe.unet.register_forward_pre_hook(lambda m, args: samples.append(args[0].clone())),
            pipe.unet.register_forward_hook(lambda m, args, out: outputs.append(out[0].clone())),
        ]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(samples), torch.stack(outputs)

    return listen


@pytest.mark.parametrize("window", [(0, 0), (1, 1), (1, 2), (2, 2), None])
def test_only_steps_within_the_window_are_steered(steer, overheard, delta, window):
    first, last = window or (0, 2)
    before, _ = overheard(lambda: steer(torch.zeros_like(delta)))
    after, _ = overheard(lambda: steer(delta, window=window))
    changed = [not torch.equal(a, b) for a, b in zip(before, after)]
    assert changed == [step > first for step in range(N)]
    inside = torch.tensor([first <= step <= last for step in range(N)])
    _, outputs = overheard(lambda: steer(delta, window=window))
    _, same = overheard(lambda: steer(delta * inside[:, None]))
    assert torch.equal(outputs, same)


def test_delta_is_taken_at_its_own_step(steer, overheard):
    _, before = overheard(lambda: steer(torch.zeros(N, 4), "conv_out"))
    change = torch.tensor([0.0, 0.0, 1.0])[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])
    _, after = overheard(lambda: steer(change, "conv_out", branch="both"))
    assert torch.equal(before[:2], after[:2])
    torch.testing.assert_close(
        after[2] - before[2], change[2].view(1, 4, 1, 1).expand(4, 4, 8, 8), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "branch, rows",
    [
        ("conditional", [False, False, True, True]),
        ("unconditional", [True, True, False, False]),
        ("both", [True] * 4),
    ],
)
def test_only_the_chosen_branch_is_steered(steer, overheard, delta, branch, rows):
    _, before = overheard(lambda: steer(torch.zeros_like(delta)))
    _, after = overheard(lambda: steer(delta, branch=branch))
    assert [not torch.equal(a, b) for a, b in zip(before[0], after[0])] == rows


def test_without_guidance_there_is_only_the_conditional_branch(steer, delta, pipe, prompts):
    plain = trajectories.generate(pipe, prompts[:2], SEEDS, **SAMPLING | {"guidance_scale": 1.0})
    images = {b: steer(delta, branch=b, guidance_scale=1.0) for b in ("conditional", "both")}
    assert np.array_equal(images["conditional"], images["both"]) and not np.array_equal(
        images["both"], plain
    )
    with pytest.raises(
        ValueError,
        match="branch 'unconditional' is not run by this pipeline.*nothing was edited; valid is conditional",
    ):
        steer(delta, branch="unconditional", guidance_scale=1.0)


def test_a_hookpoint_that_is_never_called_cannot_be_steered(steer, delta):
    with pytest.raises(
        ValueError, match="hookpoint 'mid_block.attentions' was never called, so nothing was edited"
    ):
        steer(delta, "mid_block.attentions")


def test_directions_stay_on_their_device(monkeypatch):
    monkeypatch.setattr(
        steering, "unit", lambda u: u
    )  # it looks at values, which device 'meta' has none of
    p, u = some_predictors(2, 4), torch.ones(2, 4, device="meta")
    assert steering.random_like(u, 0).device == u.device
    assert steering.addition(u, p, [1, 3], 5, strength=0.5).device == u.device
    assert (
        steering.scaling(torch.ones(1, 2, device="meta"), u, p, [1, 3], 5, factor=2).device
        == u.device
    )


def test_a_masked_token_is_steered_at_its_upright_place(steer, overheard):
    row, column = 2, 13
    mask = torch.zeros(8, 16)
    mask[row, column] = 0.5
    change = torch.ones(N, 4)
    sides = {"height": 16, "width": 32, "hookpoint": "conv_out"}
    _, before = overheard(lambda: steer(torch.zeros(N, 4), **sides))
    _, after = overheard(lambda: steer(change, mask=mask.flatten(), **sides))
    moved = after[0] - before[0]
    assert moved.shape == (4, 4, 8, 16)
    assert moved[2:].abs().amax((0, 1)).nonzero().tolist() == [[row, column]]
    torch.testing.assert_close(
        moved[2:, :, row, column], torch.full((2, 4), 0.5), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "changes, named",
    [
        (
            {"branch": "both sides"},
            "branch 'both sides' is not one of conditional, unconditional, both",
        ),
        ({"signal": "outputs"}, "signal 'outputs' is not one of output, input, update"),
        ({"delta": torch.zeros(N + 1, CHANNELS)}, "delta has 4 steps; num_inference_steps=3"),
        ({"window": (0, 3)}, r"windows holds \[0, 3\].*0 to 2"),
        ({"mask": torch.ones(9)}, "mask covers 9 tokens.*16"),
        ({"hookpoint": "nowhere"}, "hookpoint 'nowhere'"),
    ],
)
def test_what_cannot_be_steered_is_named_and_leaves_no_hook(pipe, steer, delta, changes, named):
    with pytest.raises(ValueError, match=named):
        steer(**{"delta": delta} | changes)
    assert hooks_on(pipe.unet) == 0


@HOOKPOINTS
def test_replacing_activations_by_themselves_changes_nothing(pipe, prompts, plain, hookpoint):
    steps = [0, 2]
    _, h, _ = trajectories.record(
        pipe, prompts[:2], SEEDS, hookpoint=hookpoint, steps=steps, **SAMPLING
    )
    same = steering.replace(pipe, prompts[:2], SEEDS, hookpoint, h, steps, **SAMPLING)
    np.testing.assert_allclose(same, plain, atol=1e-5)
    assert not np.allclose(
        steering.replace(pipe, prompts[:2], SEEDS, hookpoint, h + 1, steps, **SAMPLING),
        plain,
        atol=1e-3,
    )


def test_replacements_reach_their_own_step_on_the_conditional_branch(pipe, prompts, overheard):
    replacement = (
        torch.arange(4.0).view(2, 2, 1, 1).expand(2, 2, 64, 4)
    )  # image 0: 0, 1; image 1: 2, 3
    _, outputs = overheard(
        lambda: steering.replace(
            pipe, prompts[:2], SEEDS, "conv_out", replacement, [2, 0], **SAMPLING
        )
    )
    low, high = outputs.amin((2, 3, 4)), outputs.amax((2, 3, 4))
    for step, values in ((0, [1, 3]), (2, [0, 2])):
        assert low[step, 2:].tolist() == high[step, 2:].tolist() == values
    assert (low[:, :2] < high[:, :2]).all() and (low[1] < high[1]).all()


FAMILIES = {
    "sd1": (TUPLE, ["1", "2"], {}),
    "sd3": ("transformer_blocks.1", ["1", "2"], {}),
    "flux": (
        "single_transformer_blocks.0",
        ["1", "2"],
        {"true_cfg_scale": 3.0, "negative_prompt": "gray"},
    ),
    "dit": ("transformer_blocks.0", ["1", "2"], {}),
}


@pytest.mark.parametrize("branch", ["conditional", "unconditional"])
@pytest.mark.parametrize("signal", ["output", "input", "update"])
@pytest.mark.parametrize("model", FAMILIES)
def test_adding_at_one_step_is_replacing_by_the_sum(model, signal, branch):
    hookpoint, texts, options = FAMILIES[model]
    pipe, where, sampling = built(model), {"signal": signal, "branch": branch}, SAMPLING | options
    _, h, _ = trajectories.record(
        pipe, texts, SEEDS, hookpoint=hookpoint, steps=[1], **where, **sampling
    )
    change = torch.randn(N, h.shape[-1], generator=torch.Generator().manual_seed(1))
    mask = torch.linspace(0, 1, h.shape[2])
    added = steering.steer(
        pipe, texts, SEEDS, hookpoint, change, window=(1, 1), mask=mask, **where, **sampling
    )
    replaced = steering.replace(
        pipe, texts, SEEDS, hookpoint, h + mask[:, None] * change[1], [1], **where, **sampling
    )
    np.testing.assert_allclose(added, replaced, atol=1e-4)
    plain = trajectories.generate(pipe, texts, SEEDS, **sampling)
    assert np.abs(added - plain).max() > 1e-3
    same = steering.replace(pipe, texts, SEEDS, hookpoint, h, [1], **where, **sampling)
    np.testing.assert_allclose(same, plain, atol=1e-4)
