import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import some_predictors
from safetensors.torch import load_file, save_file

from helpers import coordinates, dictionary
from helpers.coders.conditioned import Conditioned
from helpers.coders.itda import Pursuit
from helpers.coders.per_step import PerStep
from helpers.coders.topk import TopK
from helpers.dictionary import Dictionary
from helpers.nonlinear import Nonlinear
from helpers.sae import SAE
from helpers.sharing import saelens

S, D, M, K = 3, 4, 10, 2
ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".venv-peers" / "bin" / "python"
CODE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
README = [code for code in CODE if "sae_lens" in code or "saelens" in code]
MANIFEST = {"model": "tiny", "hookpoint": "mid", "steps": [0, 5, 9], "prompts": ["a secret"]}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def recorded(n=60, seed=0):
    """Raw trajectories, (n, S, D)."""
    return 2 * torch.randn(n, S, D, generator=generator(seed)) + 1


def shaken(coder, seed=3):
    """The coder with biases and, where it has them, thresholds that are not all alike."""
    g = generator(seed)
    for name, value in [*coder.named_parameters(), *coder.named_buffers()]:
        if name.split(".")[-1] in ("b_enc", "b_dec", "scale", "shift"):
            value.data = 0.3 * torch.randn(value.shape, generator=g)
        if name.endswith("threshold") and not isinstance(coder, TopK):
            value.data = 0.5 * torch.rand(value.shape, generator=g)
    return coder


def two_lags():
    p = some_predictors()
    p.B = torch.zeros_like(p.A)
    p.B[2] = 0.3 * torch.randn(D, D, generator=generator(7))
    return p


SPACES = {
    "raw": lambda: coordinates.raw(some_predictors()),
    "residual": lambda: coordinates.residual(some_predictors()),
    "two lags": lambda: coordinates.residual(two_lags(), 0.5),
    "between": lambda: coordinates.between(some_predictors(), 0.4, 1.0),  # D is a matrix
    "recorded": lambda: coordinates.recorded(some_predictors()),
}
CODERS = {
    "SAE": lambda: SAE(S * D, M, K),
    "TopK": lambda: TopK(S * D, M, K),
    "one step": lambda: SAE(D, M, K),
    "one step TopK": lambda: TopK(D, M, K),
    "per step": lambda: PerStep([SAE(D, M, 1, seed) for seed in range(S)]),
    "conditioned": lambda: Conditioned(S, SAE(D, M, 1)),
}


def made(space="residual", coder="SAE"):
    return Dictionary(f"{space} {coder}", SPACES[space](), shaken(CODERS[coder]())).eval()


def theirs(folder, h):
    """What SAELens computes from a folder's files, after its documentation: codes and h_hat."""
    settings, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / saelens.FILE)
    subtracted = t["b_dec"] if settings["apply_b_dec_to_input"] else 0
    pre = (h - subtracted) @ t["W_enc"] + t["b_enc"]
    norm = t["W_dec"].norm(dim=1)
    rescaled = settings.get("rescale_acts_by_decoder_norm", False)
    pre = pre * norm if rescaled else pre
    if settings["architecture"] == "topk":
        kept = [sorted(row, reverse=True)[settings["k"] - 1] for row in pre.tolist()]
        z = torch.relu(pre) * (pre >= torch.tensor(kept, dtype=pre.dtype)[:, None])
    else:
        floor = t.get("threshold", t.get("topk_threshold", torch.zeros(())))
        z = torch.relu(pre) * (pre > floor)
    return z, (z / norm if rescaled else z) @ t["W_dec"] + t["b_dec"]


# --- written ------------------------------------------------------------------------------------


def test_the_format_is_what_its_loader_asks_for(tmp_path):
    found = made()
    assert saelens.save(found, tmp_path / "out", MANIFEST, folded=False) == tmp_path / "out"
    settings = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"cfg.json", saelens.FILE}
    assert settings["architecture"] == "jumprelu" and settings["apply_b_dec_to_input"] is True
    assert (settings["d_in"], settings["d_sae"]) == (S * D, M)
    assert settings["metadata"]["sae_lens_version"].startswith("6.")
    assert settings["metadata"]["hook_name"] == "mid" and settings["metadata"]["steps"] == [0, 5, 9]
    assert "secret" not in (tmp_path / "out" / "cfg.json").read_text()
    t = load_file(tmp_path / "out" / saelens.FILE)
    shapes = {n: tuple(v.shape) for n, v in t.items()}
    assert shapes == {
        **{"W_enc": (S * D, M), "b_enc": (M,), "W_dec": (M, S * D), "b_dec": (S * D,)},
        **{"threshold": (M,)},
    }
    assert all(v.dtype == torch.float32 for v in t.values())
    assert torch.equal(t["W_enc"], found.coder.W_enc)


@pytest.mark.parametrize("coder", ["SAE", "TopK", "per step", "conditioned"])
def test_in_coordinates_codes_are_the_dictionarys(tmp_path, coder):
    found = made(coder=coder)
    x = found.coordinates.standardise(recorded())
    saelens.save(found, tmp_path, folded=False)
    z, y_hat = theirs(tmp_path, found.coordinates.residualize(x))
    assert (z > 0).any() and (z == 0).any()
    torch.testing.assert_close(z, found.codes(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.coordinates.restore(y_hat), found(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "space, coder",
    [*((space, "SAE") for space in SPACES), *(("residual", coder) for coder in CODERS)],
)
def test_folded_raw_trajectories_have_the_same_codes(tmp_path, space, coder):
    found, h = made(space, coder), recorded()
    x = found.coordinates.standardise(h)
    saelens.save(found, tmp_path, folded=True)
    if coder == "one step TopK":  # k of every step are not S · k of all
        return
    z, h_hat = theirs(tmp_path, h.flatten(1))
    codes = found.codes(x)
    assert (codes > 0).any() and (codes == 0).any()
    torch.testing.assert_close(z, codes, rtol=1e-4, atol=1e-4)
    assert torch.equal(z > 0, codes > 0)
    expected = found.coordinates.unstandardise(found(x)).flatten(1)
    torch.testing.assert_close(h_hat, expected, rtol=1e-3, atol=1e-3)


def test_folded_decoder_rows_are_feature_trajectories_in_raw_units():
    found = made("two lags")
    u = found.directions() * found.coordinates.scale[:, None]
    torch.testing.assert_close(saelens.fold(found)["W_dec"], u.flatten(1), rtol=1e-4, atol=1e-5)


def test_folding_leaves_the_dictionary_as_it_was(tmp_path):
    found = made()
    before = {name: value.clone() for name, value in found.state_dict().items()}
    saelens.save(found, tmp_path, folded=True)
    assert all(torch.equal(value, before[name]) for name, value in found.state_dict().items())


def test_what_cannot_be_written_so_is_refused(tmp_path):
    c, g = SPACES["residual"](), generator(1)
    U, V = torch.randn(S, D, 2, generator=g), torch.randn(S, 2, D, generator=g)
    bent = Nonlinear(c.mu, c.scale, c.A, c.b, c.D_inverse, U, torch.zeros(S, 2), V)
    with pytest.raises(ValueError, match="coordinates is 'nonlinear'; .*folded=False"):
        saelens.save(Dictionary("bent", bent, SAE(S * D, M, K)), tmp_path, folded=True)
    for coder in (Pursuit(S * D, M, K), dictionary.Projection(torch.eye(S * D))):
        with pytest.raises(ValueError, match=f"coder is '{type(coder).__name__}'"):
            saelens.save(Dictionary("no", c, coder), tmp_path, folded=False)
    assert not list(tmp_path.iterdir())


# --- read ---------------------------------------------------------------------------------------


def written(folder, architecture="jumprelu", seed=0, **settings):
    """An SAE of one step as SAELens writes it; decoder rows are of any norm."""
    g = generator(seed)
    t = {"W_enc": torch.randn(D, M, generator=g), "b_enc": torch.randn(M, generator=g)}
    t |= {"W_dec": torch.randn(M, D, generator=g), "b_dec": torch.randn(D, generator=g)}
    if architecture == "jumprelu":
        t["threshold"] = torch.rand(M, generator=g)
    if architecture == "batchtopk":
        t["topk_threshold"] = torch.tensor(0.7, dtype=torch.float64)
    usual = {"architecture": architecture, "d_in": D, "d_sae": M, "dtype": "float32"}
    usual |= {"apply_b_dec_to_input": True, "normalize_activations": "none"}
    usual |= {"metadata": {"sae_lens_version": "6.54.0"}} | settings
    folder.mkdir(exist_ok=True)
    save_file(t, folder / saelens.FILE)
    (folder / "cfg.json").write_text(json.dumps(usual))
    return folder


KINDS = [
    ("jumprelu", {}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
    ("topk", {"k": 3, "rescale_acts_by_decoder_norm": False}),
    ("topk", {"k": 3, "rescale_acts_by_decoder_norm": True}),
    ("batchtopk", {"k": 2.5, "rescale_acts_by_decoder_norm": True}),
    ("standard", {}),
]


@pytest.mark.parametrize("architecture, settings", KINDS)
def test_an_sae_from_elsewhere_codes_every_kept_step_as_it_does_at_home(
    tmp_path, architecture, settings
):
    p, h = some_predictors(S, D), recorded()
    found = saelens.load(written(tmp_path / "sae", architecture, **settings), p, name="mine")
    assert found.name == "mine" and found.one_step and found.n_latents == S * M
    x = p.standardise(h)
    z, h_hat = theirs(tmp_path / "sae", h.flatten(0, 1))
    assert (z > 0).any() and (z == 0).any()
    torch.testing.assert_close(found.codes(x), z.reshape(-1, S * M), rtol=1e-3, atol=1e-4)
    assert torch.equal(found.codes(x) > 0, z.reshape(-1, S * M) > 0)
    rebuilt = p.unstandardise(found(x))
    torch.testing.assert_close(rebuilt, h_hat.view(-1, S, D), rtol=1e-3, atol=1e-3)
    if "k" in settings:
        assert found.coder.k == settings["k"]


def test_without_a_run_it_reads_activations_of_one_step(tmp_path):
    found, h = saelens.load(written(tmp_path / "sae")), recorded()[:, :1]
    z, h_hat = theirs(tmp_path / "sae", h[:, 0])
    torch.testing.assert_close(found.codes(h), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found(h)[:, 0], h_hat, rtol=1e-4, atol=1e-4)


def test_its_latents_have_directions_evidence_and_a_file_as_any_dictionarys(tmp_path):
    p = some_predictors(S, D)
    found = saelens.load(written(tmp_path / "sae", "topk", k=3), p)
    W_dec = load_file(tmp_path / "sae" / saelens.FILE)["W_dec"]
    raw_units = found.directions(M + 4) * p.scale[:, None]  # latent 4 of step 1
    torch.testing.assert_close(raw_units[1], W_dec[4])
    assert not raw_units[[0, 2]].any()
    x = p.standardise(recorded())
    scores = found.scores(x)
    active = found.codes(x) > 0
    torch.testing.assert_close(scores[active], found.codes(x)[active], rtol=1e-3, atol=1e-4)
    found.save(tmp_path / "d.safetensors")
    again, _ = Dictionary.load(tmp_path / "d.safetensors")
    assert torch.equal(again.codes(x), found.codes(x)) and torch.equal(again(x), found(x))


@pytest.mark.parametrize("coder", ["SAE", "TopK", "per step"])
def test_what_was_folded_and_written_is_read_again(tmp_path, coder):
    found, p = made("residual", coder), some_predictors()
    saelens.save(found, tmp_path, folded=True)
    x = p.standardise(recorded())
    again = saelens.load(tmp_path, p)
    assert not again.one_step and again.coder.k == found.coder.k
    torch.testing.assert_close(again.codes(x), found.codes(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again(x), found(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.directions(), found.directions(), rtol=1e-3, atol=1e-4)


# --- what can be wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"architecture": "gated"}, "architecture is 'gated'; it must be one of 'jumprelu'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ({"metadata": {"sae_lens_version": "5.9.1"}}, "sae_lens_version is '5.9.1'"),
        ({"metadata": None}, "sae_lens_version is 'None'"),
        ({"d_in": 5}, "weights is .*W_enc"),
        ({"architecture": "topk", "k": 3}, "weights is .*threshold"),
    ],
)
def test_an_sae_of_another_kind_is_refused(tmp_path, settings, said):
    written(tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=said):
        saelens.load(tmp_path / "sae")


@pytest.mark.parametrize("missing", ["cfg.json", saelens.FILE])
def test_a_missing_file_is_named(tmp_path, missing):
    (written(tmp_path / "sae") / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        saelens.load(tmp_path / "sae")


def test_weights_that_are_not_finite_are_named(tmp_path):
    path = written(tmp_path / "sae") / saelens.FILE
    save_file(load_file(path) | {"b_enc": torch.full((M,), float("nan"))}, path)
    with pytest.raises(ValueError, match="b_enc is nan; it must be finite"):
        saelens.load(tmp_path / "sae")


def test_an_sae_of_another_width_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the coder reads 4 numbers; these coordinates have 15"):
        saelens.load(written(tmp_path / "sae"), some_predictors(S, 5))


# --- the library itself -------------------------------------------------------------------------

BY_THEM = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
import sae_lens as s

def report(sae, h, folder):
    with torch.no_grad():
        z = sae.encode(h)
        out = {"h": h, "z": z.contiguous(), "h_hat": sae.decode(z).contiguous()}
    save_file(out, folder / "out.safetensors")

root = Path(sys.argv[1])
for folder in (root / "ours").iterdir():
    h = load_file(folder / "h.safetensors")["h"]
    report(s.SAE.load_from_disk(folder), h, folder)

torch.manual_seed(0)
h = 2 * torch.randn(60, 4) + 1
kinds = {
    "topk": (s.TopKSAE, s.TopKSAEConfig, {"k": 3}),
    "jumprelu": (s.JumpReLUSAE, s.JumpReLUSAEConfig, {"apply_b_dec_to_input": False}),
    "standard": (s.StandardSAE, s.StandardSAEConfig, {}),
    "batchtopk": (s.BatchTopKTrainingSAE, s.BatchTopKTrainingSAEConfig, {"k": 3}),
}
for name, (kind, config, settings) in kinds.items():
    folder = root / "theirs" / name
    sae = kind(config(d_in=4, d_sae=10, **settings))
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape)
    if name == "batchtopk":
        sae.topk_threshold.fill_(0.7)
        sae.save_model(folder / "training")
        sae.save_inference_model(folder)
        sae = s.SAE.load_from_disk(folder)
    else:
        sae.save_model(folder)
    report(sae, h, folder)
"""
CASES = {
    "residual": lambda: made(),
    "between": lambda: made("between"),
    "topk": lambda: made("residual", "TopK"),
    "per step": lambda: made("residual", "per step"),
}


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """A folder in which SAELens itself has read what `save` wrote, and written SAEs of its own."""
    if not PEER.exists():
        pytest.skip("SAELens is not there: `make bench` creates .venv-peers")
    root = tmp_path_factory.mktemp("saelens")
    for name, case in CASES.items():
        found, h = case(), recorded(100)
        y = found.coordinates.residualize(found.coordinates.standardise(h))
        for folded, given in ((True, h.flatten(1)), (False, y)):
            folder = root / "ours" / f"{name} {'folded' if folded else 'plain'}"
            saelens.save(found, folder, MANIFEST, folded=folded)
            save_file({"h": given.contiguous()}, folder / "h.safetensors")
    in_peers(["-c", BY_THEM, str(root)])
    return root


def in_peers(arguments):
    """Run Python with SAELens, without a network."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(PEER), *arguments], env=offline, capture_output=True, text=True)
    if "No module named 'sae_lens'" in done.stderr:
        pytest.skip("SAELens is not in .venv-peers: `make bench` creates it anew")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_saelens_itself_computes_the_same_codes(exchanged, name, folded):
    found, h = CASES[name](), recorded(100)
    folder = exchanged / "ours" / f"{name} {'folded' if folded else 'plain'}"
    out, c = load_file(folder / "out.safetensors"), found.coordinates
    codes = found.codes(c.standardise(h))
    assert (codes > 0).any() and (codes == 0).any()
    torch.testing.assert_close(out["z"], codes, rtol=1e-4, atol=1e-4)
    assert torch.equal(out["z"] > 0, codes > 0)
    expected = c.unstandardise(found(c.standardise(h))).flatten(1)
    rebuilt = out["h_hat"] if folded else c.unstandardise(c.restore(out["h_hat"])).flatten(1)
    torch.testing.assert_close(rebuilt, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def folder_of_the_readme(tmp_path, monkeypatch):
    """What the README's lines for SAELens write."""
    monkeypatch.chdir(tmp_path)
    exec(README[0], {"bundle": SimpleNamespace(dictionary=made(), manifest=MANIFEST)})
    return tmp_path / "sd15-saelens"


def test_the_readmes_lines_fold(folder_of_the_readme):
    h = recorded()
    z, _ = theirs(folder_of_the_readme, h.flatten(1))
    codes = made().codes(made().coordinates.standardise(h))
    torch.testing.assert_close(z, codes, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.process
def test_the_readmes_lines_for_saelens_run(exchanged, folder_of_the_readme):
    h = recorded().unflatten(0, (12, 5)).transpose(1, 2)  # (image, step, token, channel)
    save_file({"h": h.contiguous()}, "h.safetensors")
    before = (
        "from safetensors.torch import load_file, save_file\nh = load_file('h.safetensors')['h']"
    )
    after = "save_file({'codes': codes.detach()}, 'codes.safetensors')"
    in_peers(["-c", "\n".join([before, README[1], after])])
    codes = made().codes(made().coordinates.standardise(recorded())).unflatten(0, (12, 5))
    found = load_file("codes.safetensors")["codes"]
    torch.testing.assert_close(found, codes, rtol=1e-4, atol=1e-4)
    assert torch.equal(found > 0, codes > 0)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    "name", ["topk", "jumprelu", "standard", "batchtopk", "batchtopk/training"]
)
def test_what_saelens_itself_wrote_is_read(exchanged, name):
    found = saelens.load(exchanged / "theirs" / name)
    out = load_file(exchanged / "theirs" / name.split("/")[0] / "out.safetensors")
    z = found.codes(out["h"][:, None])
    assert (z > 0).any() and (z == 0).any()
    torch.testing.assert_close(z, out["z"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.rebuild(z)[:, 0], out["h_hat"], rtol=1e-4, atol=1e-4)
