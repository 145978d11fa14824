import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from activations import FakeStore

from helpers import coordinates, dictionary
from helpers.coders.conditioned import Conditioned
from helpers.coders.itda import Growing, Pursuit
from helpers.coders.per_step import PerStep
from helpers.dictionary import Dictionary
from helpers.moments import accumulate
from helpers.predictors import fit
from helpers.sae import SAE
from helpers.training import coders
from helpers.training.coders import PREFIXES
from helpers.training.dense_step import DenseStep
from helpers.training.dictionaries import held_out, of_single_steps, train_dictionary
from helpers.training.loop import TrainConfig, Training, train
from helpers.training.sparse_step import SparseStep

S, D, N, K = 3, 6, 16, 4  # S does not divide K
CONFIG = TrainConfig(N, K, n_updates=250, batch_size=128, learning_rate=1e-2, dead_after=3000)
TRAIN = {
    "per step": coders.train_per_step,
    "conditioned": functools.partial(coders.train_conditioned, updates_factor=1),
    "matryoshka": coders.train_matryoshka,
    "itda": coders.train_itda,
}
LINEAR = ("per step", "conditioned", "matryoshka")


def planted(n_images, seed):
    """Activations (image, step, token, channel): sums of 2 of 8 feature trajectories, and noise."""
    rows = torch.randn(8, S, D, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    active = torch.rand(n_images, 5, 8, generator=g).topk(2).indices
    z = torch.zeros(n_images, 5, 8).scatter(2, active, 1 + torch.rand(n_images, 5, 2, generator=g))
    h = torch.einsum("itm,msd->istd", z, rows)
    return h + 0.05 * torch.randn(h.shape, generator=g)


STORE = FakeStore(train=planted(200, 1), validation=planted(60, 2))


@functools.cache
def some_coordinates():
    train_moments = accumulate([STORE.splits["train"]])
    p = fit(train_moments, accumulate([STORE.splits["validation"]], train_moments.shift))
    return coordinates.residual(p, 0.5)


@functools.cache
def trained(name):
    return TRAIN[name](STORE, some_coordinates(), CONFIG, name=name)


def made(name):
    c = some_coordinates()
    return trained(name)[0].calibrate(held_out(STORE, c, 300))


def unseen(n=200):
    return held_out(STORE, some_coordinates(), n, seed=5)


def explained(found, x):
    return 1 - ((found(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()


@pytest.mark.parametrize("name", TRAIN)
def test_every_coder_costs_the_same_on_the_calibration_set(name):
    found = made(name)
    x = held_out(STORE, some_coordinates(), 300)
    cost = found.cost(found.codes(x)).double()
    if name == "itda":
        assert cost.max() <= K and cost.mean() > 0.8 * K
    else:
        assert cost.mean() == pytest.approx(K, rel=0.02)
    n = {"per step": S * N, "conditioned": S * S * N}.get(name, N)
    assert found.n_latents == n and found.name == name and not found.two_sided
    assert not found.one_step


@pytest.mark.parametrize("name", TRAIN)
def test_parameters_for_decoding_are_equally_many(name):
    decoders = (v for k, v in made(name).coder.state_dict().items() if k.endswith("W_dec"))
    assert sum(v.numel() for v in decoders) == N * S * D


@pytest.mark.parametrize("name", TRAIN)
def test_a_code_does_not_depend_on_its_batch(name):
    found, x = made(name), unseen(20)
    z = found.codes(x)
    for i in (0, 7):
        torch.testing.assert_close(found.codes(x[i : i + 1]), z[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRAIN)
def test_directions_are_what_codes_add(name):
    found = made(name)
    z = torch.rand(4, found.n_latents, generator=torch.Generator().manual_seed(1))
    added = found.rebuild(z) - found.rebuild(torch.zeros_like(z))
    u = torch.einsum("nm,msd->nsd", z, found.directions())
    torch.testing.assert_close(u, added, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LINEAR)
def test_evidence_of_the_steps_adds_up_to_what_the_threshold_sees(name):
    found, x = made(name), unseen(20)
    evidence, scores, z = found.evidence(x), found.scores(x), found.codes(x)
    b_enc = found.coder.b_enc
    torch.testing.assert_close(evidence.sum(-2) + b_enc, scores, rtol=1e-4, atol=1e-4)
    on = z > 0
    torch.testing.assert_close(scores[on], z[on], rtol=1e-4, atol=1e-4)
    assert on.any() and scores[~on].max() <= scores[on].max() and (scores < 0).any()
    if name != "matryoshka":  # these read one step at a time
        of_step = evidence.unflatten(-1, (S, -1)).abs().sum((0, -1))  # (step, step of the latent)
        assert torch.equal(of_step > 0, torch.eye(S, dtype=torch.bool))


def test_pursuit_has_no_evidence_and_its_scores_are_its_codes():
    found, x = made("itda"), unseen(5)
    with pytest.raises(ValueError, match="itda"):
        found.evidence(x)
    assert torch.equal(found.scores(x), found.codes(x))


@pytest.mark.parametrize("name", TRAIN)
def test_files_bring_back_every_kind(name, tmp_path):
    found, x = made(name), unseen(20)
    found.save(tmp_path / "d.safetensors", {"a": 1})
    loaded, record = Dictionary.load(tmp_path / "d.safetensors")
    assert record["a"] == 1 and type(loaded.coder) is type(found.coder)
    assert torch.equal(loaded.codes(x), found.codes(x)) and torch.equal(loaded(x), found(x))
    assert loaded.coder.k == pytest.approx(found.coder.k)


@pytest.mark.parametrize("name", LINEAR)
def test_training_helps(name):
    x, early = (
        unseen(),
        TRAIN[name](STORE, some_coordinates(), replace(CONFIG, n_updates=1), name=""),
    )
    before = explained(early[0].calibrate(held_out(STORE, some_coordinates(), 300)), x)
    assert explained(made(name), x) > max(before, 0) + 0.2
    history = trained(name)[1]
    assert history.fvu[-1] < 0.7 * history.fvu[0] and len(history.alive) == len(history.step)
    assert history.l0[-1] * (S if name == "conditioned" else 1) == pytest.approx(K, rel=0.3)


def test_atoms_from_data_explain_more_than_random_ones():
    found, x, c = made("itda"), unseen(), some_coordinates()
    random = Pursuit(c.d_in, N, K)
    rows = torch.randn(N, c.d_in, generator=torch.Generator().manual_seed(0))
    random.W_dec.copy_(torch.nn.functional.normalize(rows))
    random.b_dec.copy_(found.coder.b_dec)
    assert explained(found, x) > explained(Dictionary("random", c, random), x) + 0.1
    history = trained("itda")[1]
    assert history.alive[-1] == 1 and history.l0[-1] > 0.8 * K


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAIN)
def test_a_finished_training_is_read_and_not_repeated(name, tmp_path):
    class Empty(FakeStore):
        def batches(self, *args, **kwargs):
            raise AssertionError("trained again")
            yield

    c, config = some_coordinates(), replace(CONFIG, n_updates=4)
    first, history = TRAIN[name](STORE, c, config, name="x", checkpoints=tmp_path)
    again, told = TRAIN[name](Empty(**STORE.splits), c, config, name="x", checkpoints=tmp_path)
    assert told.fvu == history.fvu and told.step == history.step
    for key, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_checkpoints_of_coders_with_the_same_name_and_settings_are_different_files(tmp_path):
    c, config = some_coordinates(), replace(CONFIG, n_updates=2)
    for train_it in (*TRAIN.values(), train_dictionary):
        train_it(STORE, c, config, name="x", checkpoints=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(TRAIN) + S  # one a step for per step


def parts(kind):
    """A `Training` as the coders make it, fresh."""
    step = {"dense": DenseStep, "nested": functools.partial(DenseStep, prefixes=PREFIXES)}
    if kind == "itda":
        return functools.partial(Growing, tau=0.1)
    if kind == "conditioned":
        coder = Conditioned(S, SAE(D, N, 1.5, 0))
        return functools.partial(Training, coder=coder, step=DenseStep)
    return functools.partial(Training, step=step[kind])


def some_batches(n, fail_at=None):
    def batches(start):
        for i in range(start, n):
            if i == fail_at:
                raise KeyboardInterrupt
            g = torch.Generator().manual_seed(i)
            z = torch.relu(torch.randn(64, 10, generator=g) - 1)
            rows = torch.randn(10, S * D, generator=torch.Generator().manual_seed(99))
            yield z @ rows

    return batches


@pytest.mark.parametrize("kind", ["dense", "nested", "conditioned", "itda"])
def test_training_goes_on_where_it_stopped(kind, tmp_path):
    config = TrainConfig(N, 1.5, 9, batch_size=64, learning_rate=1e-2, dead_after=200)
    where = {"checkpoints": tmp_path, "save_every": 3}
    whole, history = train(some_batches(9), S * D, config, training=parts(kind))
    with pytest.raises(KeyboardInterrupt):
        train(some_batches(9, 7), S * D, config, training=parts(kind), **where)
    resumed, told = train(some_batches(9), S * D, config, training=parts(kind), **where)
    assert told.fvu == history.fvu and told.step == history.step
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)


# --- the dense step and Matryoshka --------------------------------------------------------------


def test_the_dense_step_learns_what_the_sparse_one_does():
    config = TrainConfig(64, 2, 30, batch_size=64, learning_rate=1e-2, dead_after=300)
    found = [
        train(some_batches(30), S * D, config, training=functools.partial(Training, step=step))
        for step in (SparseStep, DenseStep)
    ]
    assert found[0][1].alive[-1] < 1  # the auxiliary loss was at work
    np.testing.assert_allclose(found[0][1].fvu, found[1][1].fvu, rtol=1e-3)
    for one, other in zip(*(coder.state_dict().values() for coder, _ in found)):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_the_nested_loss_is_the_mean_over_prefixes():
    sae, y = SAE(S * D, N, 2, 0), next(some_batches(1)(0))
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    config = TrainConfig(N, 2, 1, batch_size=64)
    part = DenseStep(sae, config, prefixes=PREFIXES)(y, torch.zeros(0, dtype=torch.long))
    grads = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    pre = torch.relu((y - sae.b_dec) @ sae.W_enc + sae.b_enc)
    z = torch.where(pre >= pre.flatten().sort().values[-2 * len(y)], pre, 0.0)
    spread, losses = ((y - y.mean(0)) ** 2).sum(), []
    for m in (1, 2, 4, 8, 16):
        y_hat = z[:, :m] @ sae.W_dec[:m] + sae.b_dec
        losses.append(((y - y_hat) ** 2).sum() / spread)
    (sum(losses) / 5).backward()
    assert part.fvu.item() == pytest.approx(losses[-1].item(), rel=1e-5)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-6)


def test_the_first_latents_of_matryoshka_explain_more_than_those_of_a_plain_sae():
    x, c = unseen(), some_coordinates()
    plain = train_dictionary(STORE, c, CONFIG, name="plain")[0].calibrate(held_out(STORE, c, 300))

    def by_first(found):
        z = found.codes(x)
        z[:, N // 4 :] = 0
        return 1 - ((found.rebuild(z) - x).pow(2).sum() / x.pow(2).sum()).item()

    assert isinstance(made("matryoshka").coder, SAE)
    assert by_first(made("matryoshka")) > by_first(plain) + 0.05


# --- one step at a time -------------------------------------------------------------------------


def test_saes_of_the_steps_are_independent():
    found, x = trained("per step")[0], unseen(10)
    assert isinstance(found.coder, PerStep) and len(found.coder.saes) == S

    def batches(start):
        for h in STORE.batches("train", CONFIG.batch_size, CONFIG.seed, start):
            c = some_coordinates()
            yield c.residualize(c.standardise(h)).view(-1, S, D)[:, 1]

    alone, _ = train(batches, D, replace(CONFIG, k=K / S))
    torch.testing.assert_close(found.coder.saes[1].W_dec, alone.W_dec, rtol=1e-4, atol=1e-5)
    y = found.coordinates.residualize(x)
    z = torch.cat([sae.encode(y[:, s * D :][:, :D]) for s, sae in enumerate(found.coder.saes)], 1)
    assert torch.equal(found.codes(x), z)


def test_conditioning_is_its_definition_and_is_learnt():
    found, x = made("conditioned"), unseen(10)
    coder, y = found.coder, found.coordinates.residualize(x).view(-1, S, D)
    z = found.codes(x).view(-1, S, S * N)
    for s in range(S):
        told = y[:, s] * (1 + coder.scale[s]) + coder.shift[s]
        torch.testing.assert_close(z[:, s], coder.sae.encode(told), rtol=1e-4, atol=1e-5)
    assert coder.scale.abs().max() > 0.01 and coder.shift.abs().max() > 0.01
    own = of_single_steps(CONFIG, S, 1)
    assert (coder.sae.n_latents, coder.sae.k, own.n_updates) == (S * N, K / S, CONFIG.n_updates)


def test_before_training_conditioning_is_the_plain_sae():
    c = some_coordinates()
    sae = SAE(D, S * N, K / S, 3)
    plain, told = Dictionary("a", c, sae), Dictionary("b", c, Conditioned(S, sae))
    torch.testing.assert_close(told.codes(unseen(9)), plain.codes(unseen(9)))


# --- ITDA ---------------------------------------------------------------------------------------


def pursued(y, W, k):
    """Non-negative gradient pursuit of one input, in plain loops."""
    z, chosen, left = np.zeros(len(W)), [], y.copy()
    for _ in range(k):
        along = W @ left
        best = max((i for i in range(len(W)) if i not in chosen), key=lambda i: along[i])
        if along[best] > 0:
            chosen.append(best)
        gradient = np.array([along[i] if i in chosen else 0.0 for i in range(len(W))])
        moved = gradient @ W
        if moved @ moved > 0:
            z = np.maximum(0, z + (moved @ left) / (moved @ moved) * gradient)
        left = y - z @ W
    return z


def test_codes_are_those_of_gradient_pursuit():
    g = torch.Generator().manual_seed(0)
    coder = Pursuit(5, 9, 4).double()
    coder.W_dec.copy_(torch.nn.functional.normalize(torch.randn(9, 5, generator=g)))
    coder.b_dec.copy_(torch.randn(5, generator=g))
    y = torch.randn(30, 5, generator=g, dtype=torch.float64)
    expected = [pursued(v, coder.W_dec.numpy(), 4) for v in (y - coder.b_dec).numpy()]
    z = coder.encode(y)
    np.testing.assert_allclose(z, expected, atol=1e-9)
    assert z.min() == 0 and ((z > 0).sum(1) <= 4).all()


def test_with_orthogonal_atoms_the_largest_positive_components_are_found():
    coder = Pursuit(4, 4, 2)
    coder.W_dec.copy_(torch.eye(4))
    z = coder.encode(torch.tensor([[1.0, -5, 1, 0], [0, 0, -1, -1]]))
    torch.testing.assert_close(z, torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]]))


def test_atoms_are_what_coding_left_over_of_the_first_inputs_above_tau():
    y = next(some_batches(1)(0))
    config = TrainConfig(3, 2, 1, batch_size=64)
    coder, history = train([y], S * D, config, training=functools.partial(Growing, tau=0.1))
    centred = y - y.mean(0)
    expected = centred[:3] / centred[:3].norm(dim=1, keepdim=True)  # nothing is coded yet
    torch.testing.assert_close(coder.W_dec, expected)
    torch.testing.assert_close(coder.b_dec, y.mean(0))
    two = replace(config, n_updates=2, n_latents=4)
    second = next(some_batches(2)(1))
    coder, _ = train([y, second], S * D, two, training=functools.partial(Growing, tau=0.3))
    early = Pursuit(S * D, 2, 2)
    early.W_dec.copy_(expected[:2])
    early.b_dec.copy_(y.mean(0))
    left = second - early.decode(early.encode(second))
    above = left.pow(2).sum(1) > 0.3 * (second - early.b_dec).pow(2).sum(1)
    torch.testing.assert_close(coder.W_dec[2:], torch.nn.functional.normalize(left[above][:2]))


def test_above_a_tau_that_nothing_exceeds_no_atom_joins():
    c = some_coordinates()
    found, history = coders.train_itda(STORE, c, replace(CONFIG, n_updates=3), name="", tau=1.01)
    assert history.alive[-1] == 0 and not found.codes(unseen(5)).any()


def test_atoms_are_not_made_of_what_is_not_finite():
    y = torch.full((4, S * D), float("nan"))
    with pytest.raises(FloatingPointError, match="update 0"):
        train([y], S * D, TrainConfig(3, 2, 1, batch_size=4), training=parts("itda"))


def test_untrained_stays_what_it_was():
    found = dictionary.untrained(some_coordinates(), N, K)
    assert isinstance(found.coder, SAE) and found.n_latents == N
