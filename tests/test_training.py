import itertools
import json
import multiprocessing
import random
import signal
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from activations import FakeStore, recorded
from conftest import take

from helpers import coordinates, dictionary
from helpers.files import load_tensors, save_tensors
from helpers.moments import accumulate
from helpers.predictors import fit
from helpers.sae import SAE
from helpers.training import loop
from helpers.training.dictionaries import held_out, train_dictionary
from helpers.training.loop import TrainConfig, train

D, M, K = 16, 24, 3


def true_rows(seed=0):
    rows = torch.randn(M, D, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def sparse_data(batch_size=256, seed=1):
    """Endless sums of exactly K of M true rows."""
    g = torch.Generator().manual_seed(seed)
    rows = true_rows()
    while True:
        active = torch.rand(batch_size, M, generator=g).topk(K).indices
        sizes = 0.5 + torch.rand(batch_size, K, generator=g)
        yield torch.zeros(batch_size, M).scatter(1, active, sizes) @ rows + 1


CONFIG = TrainConfig(n_latents=2 * M, k=K, n_updates=400, learning_rate=3e-3, dead_after=5000)


def trained_on_sparse_data(**changes):
    return train(sparse_data(), D, replace(CONFIG, **changes))


@pytest.fixture(scope="module")
def trained():
    return trained_on_sparse_data()


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"dead_after": -1}, "dead_after is -1"),
        ({"n_updates": 0}, "n_updates is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"accumulate": 200, "batch_size": 256}, "sae_batch_size is 256"),
    ],
)
def test_settings_that_cannot_train_are_refused(changes, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        replace(CONFIG, **changes)


def test_batches_smaller_than_said_are_refused_where_parts_would_be_too_small():
    with pytest.raises(ValueError, match="^sae_batch_size is 256"):
        trained_on_sparse_data(accumulate=200)


def test_batches_that_run_out_are_refused():
    with pytest.raises(ValueError, match="n_updates"):
        train(take(3, sparse_data()), D, replace(CONFIG, n_updates=4))


def test_settings_are_taken_from_a_notebooks_parameters():
    parameters = {"run": "demo", "device": "auto", "sae_batch_size": 64, "dtype": "bfloat16"}
    parameters |= {"n_latents": 9, "k": 2, "n_updates": 5, "learning_rate": 0.1, "seed": 3}
    expected = TrainConfig(9, 2, 5, batch_size=64, learning_rate=0.1, dtype="bfloat16", seed=3)
    assert TrainConfig.of(parameters) == expected == TrainConfig(**asdict(expected))


# --- each update, against plain autograd --------------------------------------------------------


def naive_train(batches, d_in, c):
    """What `train` should do, written densely: the SAE, each update's loss and number of dead."""
    sae = SAE(d_in, c.n_latents, c.k, c.seed)
    optimiser = torch.optim.Adam(sae.parameters(), fused=False, foreach=False)
    since_fired, fvus, n_dead = torch.zeros(c.n_latents), [], []
    for step, y in zip(range(c.n_updates), batches):
        if step == 0:
            sae.b_dec.data = y.mean(0)
        warm = (step + 1) / (0.05 * c.n_updates + 1)
        decay = max(0.01, (c.n_updates - step) / (0.2 * c.n_updates))
        optimiser.param_groups[0]["lr"] = c.learning_rate * min(1, warm, decay)
        dead = since_fired >= c.dead_after
        since_fired += len(y)
        parts, loss, fvu = y.chunk(c.accumulate), 0, 0
        for part in parts:
            pre = (part - sae.b_dec) @ sae.W_enc + sae.b_enc
            n_kept = round(c.k * len(part))
            cut = pre.detach().flatten().sort(descending=True).values[n_kept - 1]
            z = torch.relu(pre) * (pre >= cut)
            error = part - sae.decode(z)
            part_fvu = error.pow(2).sum() / (part - part.mean(0)).pow(2).sum()
            fvu, loss = fvu + part_fvu.item() / len(parts), loss + part_fvu / len(parts)
            if dead.any():
                z_dead = torch.relu(pre[:, dead])
                top = z_dead.topk(min(int(dead.sum()), max(1, d_in // 2)), dim=1)
                kept = torch.zeros_like(z_dead).scatter(1, top.indices, top.values)
                left = error.detach()
                again = (left - kept @ sae.W_dec[dead]).pow(2).sum() / left.pow(2).sum()
                loss = loss + c.aux_coefficient * again / len(parts)
            since_fired[(z > 0).any(0)] = 0
            if cut > 0:
                sae.threshold.lerp_(cut, 1.0 if step == 0 else 0.02)
        optimiser.zero_grad()
        loss.backward()
        W, grad = sae.W_dec.detach(), sae.W_dec.grad
        grad -= (grad * W).sum(1, keepdim=True) * W
        optimiser.step()
        W /= W.norm(dim=1, keepdim=True)
        fvus.append(fvu)
        n_dead.append(int(dead.sum()))
    return sae, fvus, n_dead


PLAIN = TrainConfig(M, K, n_updates=10, learning_rate=1e-2)
SETTINGS = {  # batch size, and what is not plain
    "one update": (64, {"n_updates": 1}),
    "two updates": (64, {"n_updates": 2}),
    "ten updates": (64, {}),
    "k is not whole": (64, {"k": 2.3}),
    "dead latents": (64, {"n_latents": 2 * M, "k": 1, "dead_after": 100}),
    "more dead than the loss takes": (
        20,
        {"n_latents": 6 * M, "k": 1, "dead_after": 10, "aux_coefficient": 0.5},
    ),
    "fewer positive than k · batch": (64, {"k": M}),
    "three parts": (64, {"accumulate": 3}),
    "three parts, dead latents": (
        64,
        {"n_latents": 2 * M, "k": 1, "accumulate": 3, "dead_after": 100},
    ),
    "fewer parts than asked for": (9, {"accumulate": 4}),
    "large enough for a sample": (1000, {"n_latents": 200, "k": 5, "n_updates": 2}),
    "no aux": (64, {"n_latents": 2 * M, "k": 1, "dead_after": 100, "aux_coefficient": 0.0}),
}


@pytest.fixture
def precise():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def both(monkeypatch, name):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    batch_size, changes = SETTINGS[name]
    config = replace(PLAIN, **changes)
    data = [y.to(torch.get_default_dtype()) for y in take(10, sparse_data(batch_size))]
    return train(data, D, config), naive_train(data, D, config)


@pytest.mark.parametrize("name", SETTINGS)
def test_updates_are_those_of_autograd_and_a_dense_top_k(precise, monkeypatch, name):
    (sae, history), (expected, fvus, n_dead) = both(monkeypatch, name)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(sae.state_dict()[key], value, rtol=1e-8, atol=1e-9, msg=key)
    np.testing.assert_allclose(history.fvu, fvus, rtol=1e-9)
    np.testing.assert_allclose(history.alive, 1 - np.array(n_dead) / sae.n_latents)
    assert ("dead" in name or name == "no aux") == any(n_dead)


@pytest.mark.parametrize("name", ["dead latents", "three parts", "large enough for a sample"])
def test_in_float32_they_are_so_to_rounding(monkeypatch, name):
    (sae, history), (expected, fvus, _) = both(monkeypatch, name)
    np.testing.assert_allclose(history.fvu, fvus, rtol=1e-3)
    for key, value in expected.state_dict().items():
        off = (sae.state_dict()[key] - value).abs()
        assert off.mean() < 1e-4 and off.max() < 1e-2, key


@pytest.mark.parametrize("kind", ["dense", "sparse", "concentrated", "tied"])
@pytest.mark.parametrize("n_latents", [1000, 1024])
def test_the_largest_of_a_large_batch_are_found_however_they_lie(kind, n_latents):
    """A sample of the codes guides the choice of the largest; the threshold tells the smallest."""
    n, d = 300, 4
    y = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    if kind == "sparse":
        y[5:] = 0
    if kind == "concentrated":
        y[:, 1:] *= 1e-3
    if kind == "tied":
        y = y[:1].sign().repeat(n, 1) * torch.arange(n)[:, None].remainder(3)
    sae, _ = train([y], d, TrainConfig(n_latents, K, n_updates=1))
    pre = (y - y.mean(0)) @ SAE(d, n_latents, K).W_enc
    smallest = pre.flatten().sort().values[-K * n].item()
    assert sae.threshold.tolist() == pytest.approx([smallest] * n_latents, rel=1e-4)


def test_weights_lie_in_memory_latent_by_latent_and_gradients_are_gone(trained):
    sae, _ = trained
    assert sae.W_enc.T.is_contiguous() and sae.W_dec.is_contiguous()
    assert all(p.grad is None for p in sae.parameters()) and not sae.training
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(2 * M), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype, apart", [("bfloat16", 0.02), ("float16", 0.005)])
def test_a_narrow_encoder_trains_nearly_as_well(dtype, apart):
    _, wide = trained_on_sparse_data(n_updates=60)
    sae, narrow = trained_on_sparse_data(n_updates=60, dtype=dtype)
    assert all(v.dtype == torch.float32 for v in sae.state_dict().values())
    assert wide.fvu != narrow.fvu and np.abs(np.subtract(wide.fvu, narrow.fvu)).max() < apart


# --- what training achieves ---------------------------------------------------------------------


def best_match(sae):
    """For each true row, the largest cosine with a decoder row."""
    return (true_rows() @ sae.W_dec.detach().T).amax(1)


def test_training_finds_the_dictionary_that_made_the_data(trained):
    found, chance = best_match(trained[0]), best_match(SAE(D, 2 * M, K, seed=5))
    assert found.mean() > 0.9 > 0.7 > chance.mean()


def test_training_explains_held_out_data_with_about_k_codes(trained):
    sae, _ = trained
    y = next(sparse_data(2000, seed=9))
    with torch.no_grad():
        fvu = ((y - sae(y)) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        l0 = (sae.encode(y) > 0).sum(1).float().mean()
    assert fvu < 0.1 and 0.8 * K < l0 < 1.25 * K and (sae.threshold > 0).all()


def test_the_history_tells_what_happened(trained):
    _, history = trained
    assert history.step == [*range(0, 400, 10), 399]
    assert len(history.fvu) == len(history.l0) == len(history.alive) == len(history.step)
    assert history.fvu[-1] < 0.2 * history.fvu[0] and history.l0[-1] == pytest.approx(K, rel=0.1)
    assert all(0 <= a <= 1 for a in history.alive) and history.seconds > 0


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    a, b, c = (trained_on_sparse_data(seed=s, n_updates=20)[0].W_dec for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_auxiliary_loss_revives_dead_latents():
    def run(**aux):
        batches = sparse_data()
        # b_dec starts in the wrong place: latents fall silent
        off_centre = itertools.chain([next(batches) + 1], batches)
        config = TrainConfig(M, K, 300, learning_rate=1e-2, dead_after=2000, seed=1, **aux)
        return train(off_centre, D, config)[1]

    revived, left_dead = run(), run(aux_coefficient=0.0)
    assert min(revived.alive) < 0.7
    assert revived.alive[-1] > left_dead.alive[-1] + 0.1
    assert revived.fvu[-1] < left_dead.fvu[-1]


# --- stopping and going on ----------------------------------------------------------------------


class Stop(Exception):
    """Stands for whatever ends a training early."""


def stopping_at(n, batches):
    yield from itertools.islice(batches, n)
    raise Stop


def as_iterator(at):
    return stopping_at(at, sparse_data(32))


def as_function(at):
    return lambda start: stopping_at(at - start, itertools.islice(sparse_data(32), start, None))


RESUMABLE = TrainConfig(2 * M, 1, n_updates=11, learning_rate=1e-2, dead_after=100)


def resumable(batches, folder, save_every=3, label="SAE", record=None, **changes):
    config = replace(RESUMABLE, **changes)
    return train(
        batches, D, config, checkpoints=folder, save_every=save_every, label=label, record=record
    )


def same(one, other):
    """Whether two trainings ended in the same bits; only the clock may differ."""
    a, b = one[0].state_dict(), other[0].state_dict()
    tensors = all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    return tensors and asdict(one[1]) | {"seconds": 0} == asdict(other[1]) | {"seconds": 0}


@pytest.fixture(scope="module")
def uninterrupted():
    return resumable(sparse_data(32), None)


@pytest.mark.parametrize("kind", [as_iterator, as_function])
@pytest.mark.parametrize("stops", [(0,), (2,), (3,), (4, 7), (1, 5, 8, 9, 10)])
def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(
    tmp_path, uninterrupted, kind, stops
):
    for at in stops:
        with pytest.raises(Stop):
            resumable(kind(at), tmp_path)
    assert same(resumable(kind(99), tmp_path), uninterrupted)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("sizes", [{"n_latents": 10**10}, {"batch_size": 10**10}])
def test_what_no_memory_could_hold_is_refused_before_it_is_made(sizes):
    said = (
        r"^n_latents, sae_batch_size is \(.*10000000000.*; it must be less, .* takes .* TB of mem"
    )
    with pytest.raises(ValueError, match=said):
        train(iter(()), D, replace(TINY, **sizes))
    parts = replace(TINY, batch_size=10**10, accumulate=10**4)  # by two processes: 500,000 rows
    assert parts.memory(5, 2) == 4 * (4 * (2 * 5 + 1) * 16 + 500_000 * (16 + 6 * 5))


def test_a_training_that_could_not_be_saved_is_not_begun(tmp_path, monkeypatch):
    done = resumable(sparse_data(32), tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(OSError, match=f"^checkpoints: {tmp_path} cannot be written"):
        resumable(stopping_at(0, sparse_data(32)), tmp_path, learning_rate=2e-2)
    assert same(resumable(stopping_at(0, sparse_data(32)), tmp_path), done)


@pytest.mark.process
def test_a_training_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    n, dice, fork = 300, random.Random(0), multiprocessing.get_context("fork")
    start = time.perf_counter()
    expected = resumable(sparse_data(32), tmp_path / "whole", n_updates=n)
    took, ends = time.perf_counter() - start, []
    for _ in range(5):
        arguments = (sparse_data(32), tmp_path / "killed")
        child = fork.Process(target=resumable, args=arguments, kwargs={"n_updates": n})
        child.start()
        time.sleep(dice.uniform(0.02, 0.16) * took)
        child.kill()
        child.join()
        ends.append(child.exitcode)
    assert -signal.SIGKILL in ends and (tmp_path / "killed").exists()
    assert same(resumable(sparse_data(32), tmp_path / "killed", n_updates=n), expected)


def test_a_finished_training_is_only_loaded(tmp_path, uninterrupted):
    resumable(sparse_data(32), tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()

    def never(start):
        raise AssertionError("batches were asked for")

    loaded = resumable(never, tmp_path)
    assert same(loaded, uninterrupted) and loaded[1].seconds > 0
    assert path.read_bytes() == before and not loaded[0].training
    assert set(load_tensors(path)[0]) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}


@pytest.mark.parametrize(
    "change",
    [
        {"n_updates": 12},
        {"learning_rate": 2e-2},
        {"dead_after": 99},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"accumulate": 2},
        {"aux_coefficient": 0.1},
        {"record": {"predictors": "1234"}},
        {"label": "other"},
    ],
)
def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path, change):
    with pytest.raises(Stop):
        resumable(as_iterator(4), tmp_path)
    after = resumable(sparse_data(32), tmp_path, **change)
    assert same(after, resumable(sparse_data(32), None, **change))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_says_what_it_is_of(tmp_path):
    resumable(sparse_data(32), tmp_path, record={"predictors": "1234"}, label="my SAE")
    (path,) = tmp_path.iterdir()
    saved = load_tensors(path)[1]
    assert path.name.startswith("my_SAE-") and saved["done"] == 11
    assert saved["settings"] == asdict(RESUMABLE) | {"predictors": "1234", "d_in": D}
    assert json.dumps(saved)


def test_a_damaged_checkpoint_is_named(tmp_path):
    resumable(sparse_data(32), tmp_path)
    (path,) = tmp_path.iterdir()
    tensors, record = load_tensors(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        resumable(sparse_data(32), tmp_path)
    save_tensors(path, {"other": tensors["b_dec"]}, record)
    with pytest.raises(ValueError, match=f"{path.name} is no checkpoint"):
        resumable(sparse_data(32), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 7])
def test_a_batch_that_is_not_finite_stops_training_and_leaves_the_last_checkpoint(
    tmp_path, uninterrupted, at, value
):
    batches = take(11, sparse_data(32))
    good, batches[at] = batches[at], batches[at].clone()
    batches[at][3, 2] = value
    with pytest.raises(FloatingPointError, match=f"mine, update {at}: the batch") as error:
        resumable(batches, tmp_path, label="mine")
    kept = list(tmp_path.iterdir())
    assert [load_tensors(path)[1]["done"] for path in kept] == ([6] if at else [])
    assert all(str(p) in str(error.value) for p in kept)
    assert all(torch.isfinite(v).all() for path in kept for v in load_tensors(path)[0].values())
    batches[at] = good
    assert same(resumable(batches, tmp_path, label="mine"), uninterrupted)


def test_a_learning_rate_that_explodes_is_named_and_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"update \d+: .*learning_rate, now 1e\+25"):
        resumable(sparse_data(32), tmp_path, learning_rate=1e25, save_every=1)
    (path,) = tmp_path.iterdir()
    assert load_tensors(path)[1]["done"] >= 1


# --- dictionaries on a store --------------------------------------------------------------------

TINY = TrainConfig(n_latents=16, k=3, n_updates=60, batch_size=64, learning_rate=1e-2)


@pytest.fixture(scope="module")
def store():
    return FakeStore(train=recorded(60), validation=recorded(20, seed=1), test=recorded(20, seed=2))


@pytest.fixture(scope="module")
def predictors(store):
    train, validation = (store.splits[s] for s in ("train", "validation"))
    moments = accumulate([train])
    return fit(moments, accumulate([validation], moments.shift))


def ev(found, store):
    """Explained variance of held-out test images, in the dictionary's own coordinates."""
    x = found.coordinates.standardise(store.splits["test"].transpose(1, 2))
    y, y_hat = (found.coordinates.residualize(v) for v in (x, found(x)))
    return float(1 - (y - y_hat).pow(2).sum() / y.pow(2).sum())


@pytest.mark.parametrize("of", [coordinates.raw, coordinates.residual])
@pytest.mark.parametrize("one_step", [False, True])
def test_a_trained_dictionary_beats_an_untrained_one_and_costs_k(store, predictors, of, one_step):
    c = of(predictors)
    x = held_out(store, c)
    floor = dictionary.untrained(c, TINY.n_latents, TINY.k).calibrate(x)
    found, history = train_dictionary(store, c, TINY, name="mine", one_step=one_step)
    found.calibrate(x)
    assert found.name == "mine" and found.one_step == one_step
    assert ev(found, store) > ev(floor, store) + 0.2
    assert found.cost(found.codes(x)).double().mean() == pytest.approx(TINY.k, rel=0.1)
    assert history.step[-1] == TINY.n_updates * (3 if one_step else 1) - 1


def test_a_dictionary_is_trained_on_the_stores_batches_in_its_coordinates(store, predictors):
    c = coordinates.residual(predictors)
    config = replace(TINY, n_updates=5, seed=4)
    found, _ = train_dictionary(store, c, config, name="x")
    batches = (c.residualize(c.standardise(h)) for h in store.batches("train", 64, 4))
    expected, _ = train(batches, c.d_in, config)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.coder.state_dict()[name], value), name


def test_a_one_step_sae_has_equal_parameters_and_cost_and_sees_as_many_trajectories(
    store, predictors
):
    c = coordinates.raw(predictors)  # 3 steps
    config = replace(TINY, n_updates=4, k=4)  # which 3 does not divide
    found, history = train_dictionary(store, c, config, name="x", one_step=True)
    assert found.coder.n_latents == 48 and found.coder.d_in == 4
    assert found.coder.k == 4 / 3 and history.step[-1] == 11
    assert train_dictionary(store, c, replace(TINY, n_updates=1), name="x", one_step=True)[
        0
    ].coder.k == (TINY.k // 3)
    _, short = train_dictionary(store, c, config, name="x", one_step=True, updates_factor=1)
    assert short.step[-1] == 3


@pytest.mark.parametrize("one_step", [False, True])
def test_dictionaries_cost_the_same_where_the_steps_do_not_divide_k(store, predictors, one_step):
    c = coordinates.raw(predictors)  # 3 steps
    x = held_out(store, c)
    config = replace(TINY, n_updates=4, k=4)
    found, history = train_dictionary(store, c, config, name="x", one_step=one_step)
    cost = found.calibrate(x).cost(found.codes(x)).double().mean()
    assert cost == pytest.approx(4, abs=0.01) and history.step[-1] == (11 if one_step else 3)


def test_dictionaries_of_other_coordinates_or_origin_do_not_share_a_checkpoint(
    tmp_path, store, predictors
):
    config = replace(TINY, n_updates=2)

    def run(c, **made_from):
        train_dictionary(
            store, c, config, name="same", checkpoints=tmp_path, made_from=made_from, device="cpu"
        )
        return len(list(tmp_path.iterdir()))

    a, b = (coordinates.residual(predictors, e) for e in (0.0, 1.0))
    assert [run(a), run(b), run(a), run(a, predictors="12"), run(b)] == [1, 2, 2, 3, 3]


class OneOfTwo:
    """An accelerator that is the second of two processes, alone."""

    device, process_index, num_processes, is_main_process = torch.device("cpu"), 1, 2, True

    def reduce(self, value, how):
        return value

    def gather(self, value):
        return value


@pytest.mark.parametrize("one_step", [False, True])
def test_each_process_trains_on_its_share_of_a_batch(store, predictors, one_step):
    asked = []

    class Asked(FakeStore):
        def batches(self, split, batch_size, seed=0, start=0, share=(0, 1)):
            asked.append((split, share))
            yield from super().batches(split, batch_size, seed, start, share)

    config = replace(TINY, n_updates=2, n_latents=8, batch_size=60)
    train_dictionary(
        Asked(**store.splits),
        coordinates.raw(predictors),
        config,
        name="x",
        one_step=one_step,
        accelerator=OneOfTwo(),
    )
    assert asked == [("train", (1, 2))]


def test_held_out_trajectories_are_standardised_validation_ones(store, predictors):
    c = coordinates.raw(predictors)
    x, few = held_out(store, c), held_out(store, c, n=30, seed=1)
    assert x.shape == (100, 3, 4) and few.shape == (30, 3, 4)
    every = c.standardise(store.splits["validation"].transpose(1, 2)).flatten(0, 1)
    assert all((every - row).abs().amax((1, 2)).min() < 1e-6 for row in few)
