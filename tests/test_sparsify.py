import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import some_predictors
from safetensors.torch import load_file, save_file

from helpers.sharing import sparsify

S, D, M, K = 3, 4, 10, 2
PEER = Path(__file__).resolve().parents[1] / ".venv-peers" / "bin" / "python"


def written(folder, **settings):
    """An SAE as sparsify writes it."""
    g = torch.Generator().manual_seed(0)
    t = {
        "encoder.weight": torch.randn(M, D, generator=g),
        "encoder.bias": torch.randn(M, generator=g),
        "W_dec": torch.randn(M, D, generator=g),
        "b_dec": torch.randn(D, generator=g),
    }
    folder.mkdir()
    save_file(t, folder / sparsify.FILE)
    usual = {"activation": "topk", "k": K, "d_in": D, "num_latents": M, "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(usual | settings))
    return t


def test_codes_are_the_k_largest_of_its_linear_layer(tmp_path):
    t, p = written(tmp_path / "sae"), some_predictors(S, D)
    found = sparsify.load(tmp_path / "sae", p)
    h = torch.randn(40, S, D, generator=torch.Generator().manual_seed(1))
    pre = (h - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    expected = torch.zeros_like(pre)
    for i, s in torch.cartesian_prod(torch.arange(len(h)), torch.arange(S)).tolist():
        for j in pre[i, s].argsort()[-K:]:
            expected[i, s, j] = max(pre[i, s, j], 0)
    x = p.standardise(h)
    assert found.name == "sparsify" and found.one_step and found.coder.k == K
    torch.testing.assert_close(found.codes(x), expected.flatten(1), rtol=1e-4, atol=1e-5)
    rebuilt = p.unstandardise(found(x))
    torch.testing.assert_close(rebuilt, expected @ t["W_dec"] + t["b_dec"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"transcode": True}, "transcode is True; it must be false"),
        ({"skip_connection": True}, "skip_connection is True"),
        ({"activation": "groupmax"}, "activation is 'groupmax'"),
        ({"k": 0}, "k is 0; it must be from 1 to 10"),
        ({"k": None}, "k is None; it must be from 1 to 10"),
    ],
)
def test_an_sae_of_another_kind_is_refused(tmp_path, settings, said):
    written(tmp_path / "sae", **settings)
    with pytest.raises(ValueError, match=said):
        sparsify.load(tmp_path / "sae")


def test_weights_of_something_else_are_refused(tmp_path):
    t = written(tmp_path / "sae")
    save_file(t | {"W_skip": torch.zeros(D, D)}, tmp_path / "sae" / sparsify.FILE)
    with pytest.raises(ValueError, match="weights is .*W_skip"):
        sparsify.load(tmp_path / "sae")
    save_file({"other": torch.zeros(3)}, tmp_path / "sae" / sparsify.FILE)
    with pytest.raises(ValueError, match="with encoder.weight"):
        sparsify.load(tmp_path / "sae")
    (tmp_path / "sae" / sparsify.FILE).unlink()
    with pytest.raises(FileNotFoundError, match="sae.safetensors does not exist"):
        sparsify.load(tmp_path / "sae")


WRITTEN_BY_THEM = """
import sys, torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig
torch.manual_seed(0)
sae = SparseCoder(4, SparseCoderConfig(num_latents=10, k=2))
for parameter in sae.parameters():
    parameter.data = torch.randn(parameter.shape)
sae.save_to_disk(sys.argv[1])
h = 2 * torch.randn(60, 4) + 1
with torch.no_grad():
    values, indices, _ = sae.encode(h)
    z = torch.zeros(60, 10).scatter(1, indices, values)
    out = {"h": h, "z": z, "h_hat": (z @ sae.W_dec + sae.b_dec).contiguous()}
save_file(out, sys.argv[1] + "/out.safetensors")
"""


@pytest.mark.slow
@pytest.mark.process
def test_what_sparsify_itself_wrote_is_read(tmp_path):
    if not PEER.exists():
        pytest.skip("sparsify is not there: `make bench` creates .venv-peers")
    command = [str(PEER), "-c", WRITTEN_BY_THEM, str(tmp_path)]
    quiet = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, out = sparsify.load(tmp_path), load_file(tmp_path / "out.safetensors")
    z = found.codes(out["h"][:, None])
    torch.testing.assert_close(z, out["z"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.rebuild(z)[:, 0], out["h_hat"], rtol=1e-4, atol=1e-4)
