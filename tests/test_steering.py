import numpy as np
import pytest
import torch
from conftest import GRID, SAMPLING, TOKENS, TUPLE, built, hooks_on, some_predictors

from helpers import coordinates, dictionary, steering, trajectories
from helpers.hooks import Tap
from helpers.pipelines.generate import generate

N, CHANNELS, N_TOKENS = SAMPLING["num_inference_steps"], 32, 16
SEEDS = [3, 4]


@pytest.fixture
def steer(pipe, prompts):
    def run(delta, tap=TOKENS, **changes):
        return steering.steer(pipe, prompts[:2], SEEDS, tap, delta, **SAMPLING | changes)

    return run


@pytest.fixture(scope="module")
def plain(pipe, prompts):
    return generate(pipe, prompts[:2], SEEDS, **SAMPLING)


@pytest.fixture
def delta():
    return 3 * torch.randn(N, CHANNELS, generator=torch.Generator().manual_seed(0))


def residual(n_steps=3, d=4, seed=0):
    return coordinates.residual(some_predictors(n_steps, d, seed))


# --- directions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_a_unit_trajectory_has_rms_norm_one_and_keeps_its_profile(size):
    u = size * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    unit = steering.unit(u)
    assert unit.norm(dim=1).pow(2).mean().sqrt() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(unit / unit.norm(), u / u.norm())


def test_a_direction_of_zeros_is_refused():
    with pytest.raises(ValueError, match="direction is 0"):
        steering.unit(torch.zeros(3, 4))


@pytest.mark.parametrize("through", [None, residual(5, 8)])
def test_a_random_control_has_the_same_norm_at_every_step(through):
    u = torch.randn(5, 8) * torch.tensor([0.0, 1, 2, 3, 4])[:, None]
    control = steering.random_like(u, 0, through)
    torch.testing.assert_close(control.norm(dim=1), u.norm(dim=1))
    assert torch.equal(control, steering.random_like(u, 0, through))
    assert not torch.equal(control, steering.random_like(u, 1, through))
    assert abs(torch.nn.functional.cosine_similarity(control[1:], u[1:])).max() < 0.99


def test_a_random_control_through_the_recurrence_persists():
    through = residual(2, 500)
    through.A[1], through.D_inverse[1] = torch.eye(500), 1.0
    u = torch.ones(2, 500)
    cosine = torch.nn.functional.cosine_similarity(*steering.random_like(u, 0, through), dim=0)
    assert cosine == pytest.approx(0.5**0.5, abs=0.1)  # of w[0] with w[0] + w[1]
    cosine = torch.nn.functional.cosine_similarity(*steering.random_like(u, 0), dim=0)
    assert cosine == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize("two_lags", [False, True])
def test_what_each_step_adds_is_rho_times_the_decoder_row(two_lags):
    p = some_predictors(4)
    B = 0.3 * torch.randn(4, 4, 4) if two_lags else None
    through = coordinates.Coordinates(p.mu, p.scale, p.A, p.b, p.rho, B)
    w = torch.randn(16)
    new = steering.only_new(through.feature_trajectories(w), through)
    torch.testing.assert_close(new, p.rho[:, None] * w.view(4, 4), rtol=1e-4, atol=1e-5)


def test_an_addition_worked_by_hand():
    p = residual(2, 4)
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
    p = residual(3, 4)
    u = torch.randn(3, 4)
    codes = torch.tensor([[0.0, 2.0], [1.0, 0.5]])
    change = steering.scaling(codes, u, p, [0, 1, 2], 3, factor)
    assert change.shape == (3, 2, 2, 4)
    for s in range(3):
        for i in range(2):
            for t in range(2):
                torch.testing.assert_close(change[s, i, t], times * codes[i, t] * p.scale[s] * u[s])
    several = torch.stack([codes, 2 * codes], -1)
    both = steering.scaling(several, torch.stack([u, u]), p, [0, 1, 2], 3, factor)
    torch.testing.assert_close(both, 3 * change)


@pytest.mark.parametrize("value", [1.5, torch.tensor([1.0, -2.0])])
def test_setting_brings_the_codes_of_a_linear_coder_to_the_value(value):
    p = residual(3, 4)
    rows = torch.linalg.qr(torch.randn(12, 2, generator=torch.Generator().manual_seed(0)))[0].T
    linear = dictionary.Dictionary("rows", p, dictionary.Projection(rows))
    h = torch.randn(2, 3, 5, 4)  # (image, step, token, channel)
    codes = linear.codes(p.standardise(h.transpose(1, 2)))
    change = steering.setting(codes, linear.directions(), p, [0, 1, 2], 3, value)
    after = linear.codes(p.standardise((h + change.transpose(0, 1)).transpose(1, 2)))
    torch.testing.assert_close(after, torch.as_tensor(value).expand(2, 5, 2), rtol=1e-4, atol=1e-4)
    one = steering.setting(codes[..., 0], linear.directions(0), p, [0, 1, 2], 3, 1.5)
    after = linear.codes(p.standardise((h + one.transpose(0, 1)).transpose(1, 2)))
    torch.testing.assert_close(after[..., 0], torch.full((2, 5), 1.5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[..., 1], codes[..., 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_steps_are_the_same_ones_none_at_its_place(seed):
    u = torch.randn(5, 4)
    control = steering.shuffled_steps(u, seed)
    assert torch.equal(control, steering.shuffled_steps(u, seed))
    assert (control != u).any(1).all()
    assert sorted(control.tolist()) == sorted(u.tolist())
    assert torch.equal(steering.shuffled_steps(u[:2], seed), u[:2].flip(0))


def test_one_step_cannot_be_shuffled():
    with pytest.raises(ValueError, match="steps is 1"):
        steering.shuffled_steps(torch.ones(1, 4), 0)


def test_latents_together_worked_by_hand():
    us = torch.tensor([[[3.0, 0], [4, 0]], [[0, 1.0], [0, 0]]])  # RMS norms √12.5 and √0.5
    expected = [[3 / 12.5**0.5, 2**0.5], [4 / 12.5**0.5, 0]]
    torch.testing.assert_close(steering.together(us), torch.tensor(expected))
    torch.testing.assert_close(steering.together(7 * us), steering.together(us))
    torch.testing.assert_close(steering.together(us, [0, 2.0]), 2 * steering.unit(us[1]))
    with pytest.raises(ValueError, match=r"weights is \(3,\).*2 trajectories"):
        steering.together(us, [1, 2, 3])


def test_a_projection_onto_a_subspace_worked_by_hand():
    basis = torch.zeros(2, 3, 2)
    basis[0, 0, 0] = basis[0, 1, 1] = 1  # a plane at the first step
    basis[1, :, 0] = torch.tensor([0.6, 0.8, 0])  # a line at the second
    u = torch.tensor([[1.0, 2, 3], [1, 2, 3]])
    expected = torch.tensor([[1, 2, 0], [0.6 * 2.2, 0.8 * 2.2, 0]])
    torch.testing.assert_close(steering.onto(u, basis), expected)
    both = steering.onto(torch.stack([u, -u]), basis)
    torch.testing.assert_close(both, torch.stack([expected, -expected]))


@pytest.mark.parametrize(
    "window", [(-1, 2), (2, 1), (0, 4), (4, 4), [0], [0, 1, 2], 5, [0, 1.5], "01", []]
)
def test_a_window_outside_the_steps_is_refused(window):
    with pytest.raises(ValueError, match="windows is .* from 0 to 3"):
        steering.check_window(window, 4)


def test_a_window_inside_the_steps_is_taken():
    assert steering.check_window([0, 3], 4) == (0, 3) and steering.check_window((2, 2), 4) == (2, 2)


# --- steering images ----------------------------------------------------------------------------

HOOKPOINTS = pytest.mark.parametrize("tap", [Tap(TOKENS), Tap(TUPLE), Tap(GRID)])


@HOOKPOINTS
def test_adding_nothing_goes_through_the_edit_and_changes_nothing(steer, plain, delta, tap):
    nothing = torch.zeros(N, CHANNELS)
    assert np.array_equal(steer(nothing, tap), plain)
    assert np.array_equal(steer(delta, tap, mask=torch.zeros(2, N_TOKENS), idle=True), plain)
    np.testing.assert_allclose(steer(nothing + 1e-12, tap), plain, atol=1e-6)
    with pytest.raises(ValueError, match="delta is .*33.*32 channels"):  # so the edit was reached
        steer(torch.zeros(N, CHANNELS + 1), tap)


@HOOKPOINTS
def test_steering_changes_images(steer, plain, delta, tap):
    changed = steer(delta, tap)
    assert changed.shape == plain.shape and changed.dtype == np.float32
    assert all(abs(a - b).max() > 1e-3 for a, b in zip(changed, plain))


def test_an_image_whose_mask_is_zero_stays_as_it_is(steer, plain, delta):
    mask = torch.stack([torch.zeros(N_TOKENS), torch.ones(N_TOKENS)])
    changed = steer(delta, mask=mask)
    assert np.array_equal(changed[0], plain[0]) and not np.array_equal(changed[1], plain[1])


def test_a_delta_for_every_image_and_token_equals_the_same_one_for_all(steer, delta):
    per_token = delta[:, None, None].expand(N, 2, N_TOKENS, CHANNELS)
    assert np.array_equal(steer(per_token), steer(delta))


def test_batches_join_to_the_same_images(pipe, prompts, delta):
    mask = torch.rand(5, N_TOKENS, generator=torch.Generator().manual_seed(1))
    per_image = delta[:, None, None] * torch.arange(1.0, 6)[:, None, None]
    seeds = list(range(5))
    for change in (delta, per_image):
        made = [
            steering.steer(
                pipe, prompts, seeds, TOKENS, change, mask=mask, batch_size=b, **SAMPLING
            )
            for b in (None, 2)
        ]
        np.testing.assert_allclose(*made, atol=1e-5)


@pytest.fixture
def overheard(pipe):
    """Inputs and outputs of the U-Net during `run()`, (step, row, channel, height, width)."""

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


def test_without_guidance_there_is_only_the_conditional_branch(steer, delta, plain):
    images = {b: steer(delta, branch=b, guidance_scale=1.0) for b in ("conditional", "both")}
    assert np.array_equal(images["conditional"], images["both"])
    assert not np.array_equal(images["both"], plain)
    with pytest.raises(ValueError, match="branch is 'unconditional'.*be conditional or both"):
        steer(delta, branch="unconditional", guidance_scale=1.0)


def test_the_branch_is_the_taps_own_unless_another_is_given(steer, delta):
    tap = Tap(TOKENS, branch="unconditional")
    own = steer(delta, branch="unconditional")
    assert np.array_equal(steer(delta, tap), own)
    assert not np.array_equal(steer(delta, tap, branch="conditional"), own)


@HOOKPOINTS
def test_keeping_the_norm_turns_tokens_around_the_centre(pipe, prompts, plain, delta, tap):
    where, steps, heard = (pipe, prompts[:2], SEEDS, tap), [0, 1, 2], {}
    _, h, _ = trajectories.record(*where, steps, **SAMPLING)
    centre = torch.randn(N, CHANNELS, generator=torch.Generator().manual_seed(2))
    mask = torch.linspace(0, 1, N_TOKENS)
    settings = {"mask": mask, "centre": centre, "window": (0, 0)} | SAMPLING

    def watch(rows, step, images):
        heard[step] = rows.clone()

    both = steering.steer(*where, delta, keep_norm=True, watch=watch, **settings)
    off, pushed = h[:, 0] - centre[0], h[:, 0] + mask[:, None] * delta[0] - centre[0]
    expected = pushed * (off.norm(dim=-1) / pushed.norm(dim=-1))[..., None] + centre[0]
    torch.testing.assert_close(heard[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((heard[0] - centre[0]).norm(dim=-1), off.norm(dim=-1))
    assert torch.equal(heard[0][:, 0], h[:, 0, 0])  # whose weight is 0
    first = steering.steer(*where, delta, keep_norm=torch.tensor([True, False]), **settings)
    free = steering.steer(*where, delta, **settings)
    assert np.array_equal(first[0], both[0]) and np.array_equal(first[1], free[1])
    assert min(abs(both - free).max((1, 2, 3))) > 1e-3 and abs(both - plain).max() > 1e-3


def test_what_watches_hears_each_step_as_the_edit_left_it(pipe, prompts, delta):
    where, heard = (pipe, prompts[:3], [3, 4, 5], TOKENS), {}

    def watch(rows, step, images):
        heard[step, images.start] = rows.clone()

    settings = {"window": (1, 1), "batch_size": 2} | SAMPLING
    steering.steer(*where, delta, branch="both", watch=watch, **settings)
    assert sorted(heard) == [(step, start) for step in range(N) for start in (0, 2)]
    _, h, _ = trajectories.record(*where, [0, 1], **SAMPLING)
    for start in (0, 2):
        here = h[start : start + 2]
        torch.testing.assert_close(heard[0, start], here[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(heard[1, start], here[:, 1] + delta[1], rtol=1e-4, atol=1e-4)


def test_a_hookpoint_that_is_never_called_cannot_be_steered(steer, delta):
    with pytest.raises(ValueError, match="hookpoint is 'mid_block.attentions'"):
        steer(delta, "mid_block.attentions")


def test_directions_stay_on_their_device(monkeypatch):
    monkeypatch.setattr(steering, "unit", lambda u: u)  # it reads values, and 'meta' has none
    p, u = residual(2, 4), torch.ones(2, 4, device="meta")
    codes = torch.ones(1, 2, device="meta")
    assert steering.random_like(u, 0).device == u.device
    assert steering.addition(u, p, [1, 3], 5, strength=0.5).device == u.device
    assert steering.scaling(codes, u, p, [1, 3], 5, factor=2).device == u.device


def test_a_masked_token_is_steered_at_its_upright_place(steer, overheard):
    row, column = 2, 13
    mask = torch.zeros(8, 16)
    mask[row, column] = 0.5
    change = torch.ones(N, 4)
    sides = {"height": 16, "width": 32, "tap": "conv_out"}
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
        ({"branch": "both sides"}, "branch is 'both sides'.*'both'"),
        ({"tap": Tap(TOKENS, "outputs")}, "signal is 'outputs'"),
        ({"delta": torch.zeros(N + 1, CHANNELS)}, "delta is .*3 steps"),
        ({"window": (0, 3)}, r"windows is \(0, 3\).* 0 to 2"),
        ({"mask": torch.ones(9)}, "mask is .*16 tokens"),
        ({"mask": torch.ones(9), "window": (2, 2)}, "mask is .*16 tokens"),
        ({"mask": torch.ones(3, N_TOKENS)}, r"mask is \(3, 16\).*2 images"),
        ({"mask": torch.zeros(2, N_TOKENS)}, "mask is 0; it must be above 0 at some token"),
        ({"mask": torch.full((N_TOKENS,), torch.nan)}, "mask is nan; it must be finite"),
        ({"delta": torch.full((N, CHANNELS), torch.inf)}, "delta is inf; it must be finite"),
        ({"delta": torch.zeros(N, CHANNELS - 1), "window": (2, 2)}, "delta is .*31.*32 channels"),
        ({"delta": torch.zeros(N, 1)}, "delta is .*32 channels"),
        ({"delta": torch.zeros(N, 3, 1, CHANNELS)}, "delta is .*1 or 2 images"),
        ({"delta": torch.zeros(N, 2, CHANNELS)}, "delta is .*1 or 2 images"),
        ({"keep_norm": True}, "centre is None"),
        ({"keep_norm": True, "centre": torch.zeros(N, 31)}, "centre is .*32 channels"),
        ({"keep_norm": True, "centre": torch.full((N, 32), torch.nan)}, "centre is nan"),
        ({"tap": "nowhere"}, "hookpoint is 'nowhere'"),
    ],
)
def test_what_cannot_be_steered_is_named_at_once(pipe, steer, delta, changes, named):
    finished = []
    handle = pipe.unet.register_forward_hook(lambda *_: finished.append(1))
    with pytest.raises(ValueError, match=named):
        steer(**{"delta": delta} | changes)
    handle.remove()
    assert not finished and hooks_on(pipe.unet) == 0


# --- projecting out -----------------------------------------------------------------------------


@pytest.mark.parametrize("amount, left", [(0, 1), (1, 0), (2, -1), (0.5, 0.5)])
def test_a_projection_worked_by_hand(pipe, prompts, overheard, amount, left):
    v, centre = torch.tensor([3.0, 4.0, 0, 0]), torch.tensor([0.5, 0.25, 7, 8])
    _, before = overheard(lambda: generate(pipe, prompts[:2], SEEDS, **SAMPLING))
    _, after = overheard(
        lambda: steering.project_out(
            *(pipe, prompts[:2], SEEDS, "conv_out", v.repeat(N, 1), centre.repeat(N, 1)),
            amount=amount,
            **SAMPLING,
        )
    )
    before, after = before[0, 2:].flatten(2), after[0, 2:].flatten(2)  # conditional, first step
    component = 0.6 * (before[:, 0] - 0.5) + 0.8 * (before[:, 1] - 0.25)
    moved = (left - 1) * component[:, None] * torch.tensor([0.6, 0.8, 0, 0])[:, None]
    torch.testing.assert_close(after - before, moved, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"v": torch.zeros(N, CHANNELS + 1)}, "direction is .*33.*32 channels"),
        ({"v": torch.full((N, CHANNELS), torch.nan)}, "direction is nan"),
        ({"centre": torch.zeros(N, 1)}, "centre is .*32 channels"),
        ({"centre": torch.zeros(N, 3, CHANNELS)}, "centre is .*1 or 2 images"),
        ({"mask": torch.zeros(N_TOKENS)}, "mask is 0"),
    ],
)
def test_what_cannot_be_projected_out_is_named(pipe, prompts, changes, named):
    given = {"v": torch.ones(N, CHANNELS), "centre": torch.zeros(N, CHANNELS)} | changes
    v, centre = given.pop("v"), given.pop("centre")
    with pytest.raises(ValueError, match=named):
        steering.project_out(pipe, prompts[:2], SEEDS, TOKENS, v, centre, **given, **SAMPLING)


def test_a_projection_heeds_its_mask_and_each_images_direction(pipe, prompts, plain):
    v, centre = torch.randn(N, 2, CHANNELS), torch.zeros(N, CHANNELS)
    where, sampling = (pipe, prompts[:2], SEEDS, TOKENS), SAMPLING | {"amount": 20.0}
    mask = torch.stack([torch.zeros(N_TOKENS), torch.ones(N_TOKENS)])
    images = steering.project_out(*where, v, centre, mask=mask, **sampling)
    assert np.array_equal(images[0], plain[0]) and not np.array_equal(images[1], plain[1])
    both = steering.project_out(*where, v, centre, batch_size=1, **sampling)
    second = steering.project_out(*where, v[:, 1], centre, **sampling)
    np.testing.assert_allclose(both[1], images[1], atol=1e-5)
    np.testing.assert_allclose(both[1], second[1], atol=1e-5)
    assert abs(both[0] - second[0]).max() > 1e-4


# --- replacing ----------------------------------------------------------------------------------


@HOOKPOINTS
def test_replacing_activations_by_themselves_changes_nothing(pipe, prompts, plain, tap):
    steps, where = [0, 2], (pipe, prompts[:2], SEEDS, tap)
    _, h, _ = trajectories.record(*where, steps, **SAMPLING)
    same = steering.replace(*where, h, steps, **SAMPLING)
    np.testing.assert_allclose(same, plain, atol=1e-5)
    other = steering.replace(*where, h + 1, steps, **SAMPLING)
    assert not np.allclose(other, plain, atol=1e-3)
    np.testing.assert_allclose(
        steering.replace(*where, h + 1, steps, batch_size=1, **SAMPLING), other, atol=1e-5
    )


@pytest.mark.parametrize(
    "replacement, named",
    [
        (torch.zeros(2, 1, N_TOKENS, CHANNELS), "replacement is .*2 images and 2 steps"),
        (torch.full((2, 2, N_TOKENS, CHANNELS), torch.nan), "replacement is nan"),
    ],
)
def test_a_replacement_that_does_not_fit_is_named(pipe, prompts, replacement, named):
    with pytest.raises(ValueError, match=named):
        steering.replace(pipe, prompts[:2], SEEDS, TOKENS, replacement, [0, 2], **SAMPLING)


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


@pytest.mark.parametrize(
    "model, signal, branch",
    [
        *(("sd1", signal, "conditional") for signal in ("output", "input", "update")),
        *((model, "output", "unconditional") for model in FAMILIES),
        *((model, "update", "conditional") for model in ("sd3", "flux")),
        ("dit", "input", "conditional"),
    ],
)
def test_adding_at_one_step_is_replacing_by_the_sum(model, signal, branch):
    hookpoint, texts, options = FAMILIES[model]
    where, sampling = (
        (built(model), texts, SEEDS, Tap(hookpoint, signal, branch)),
        SAMPLING | options,
    )
    images, h, _ = trajectories.record(*where, [1], **sampling)
    change = torch.randn(N, h.shape[-1], generator=torch.Generator().manual_seed(1))
    mask = torch.linspace(0, 1, h.shape[2])
    added = steering.steer(*where, change, window=(1, 1), mask=mask, **sampling)
    replaced = steering.replace(*where, h + mask[:, None] * change[1], [1], **sampling)
    np.testing.assert_allclose(added, replaced, atol=1e-4)
    assert np.abs(added - images).max() > 1e-3
