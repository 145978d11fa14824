import numpy as np
import pytest
import torch
from explored import GRID, LATENTS, PROMPTS, N, codes_of, tiny_run
from sklearn.metrics import roc_auc_score

from helpers.explorer import records, stream
from helpers.explorer.examples import Counts
from helpers.explorer.record import STATISTICS, Name, Strip, save_strip, title
from helpers.files import save_json
from helpers.measure import timing
from helpers.measure.metrics import Estimate
from helpers.steering import only_new

COUNTS = Counts(random=3, quantile=4, top=2, sample=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def built(run):
    return records.build(run, counts=COUNTS)


def busy(run):
    """Latents that fire in some images and are silent in others."""
    fired = (codes_of(run)[0] > 0).any(1).sum(0)
    return [i for i in range(LATENTS) if 2 <= fired[i] < N]


def test_statistics_are_those_of_all_codes_at_once(run, built):
    z, x = codes_of(run)
    table = built.table
    assert list(table) == list(STATISTICS) and built.latents == range(LATENTS)
    np.testing.assert_allclose(table["firing rate"], (z > 0).mean((0, 1)))
    np.testing.assert_allclose(table["L0 share"], (z > 0).sum((0, 1)) / (z > 0).sum())
    np.testing.assert_allclose(table["images"], (z > 0).any(1).mean(0))
    np.testing.assert_allclose(table["largest code"], z.max((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(built.array("mean_map"), z.mean(0).T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(built.strength.toarray(), z.max(1), rtol=1e-4, atol=1e-6)
    lifetimes = timing.measure(run.dictionary, [x]).lifetimes(run.store.steps)
    for name in ("onset", "peak", "duration"):
        np.testing.assert_allclose(table[name], lifetimes[name], rtol=1e-3, atol=1e-3)


def test_examples_come_random_first_with_the_maps_of_their_codes(run, built):
    z, x = codes_of(run)
    evidence = run.dictionary.evidence(x).numpy()  # (image, token, step, latent)
    assert len(busy(run)) > 3
    for latent in busy(run):
        found, strength = built.record(latent).examples, z[..., latent].max(1)
        assert list(found) == ["random", "quantile", "top"]
        order = np.argsort(-strength, kind="stable")[:2]
        assert found["top"].images.tolist() == order[strength[order] > 0].tolist()
        assert len(found["random"].images) == min(3, (strength > 0).sum())
        for own in found.values():
            assert (strength[own.images] > 0).all()
            np.testing.assert_allclose(own.codes, strength[own.images], rtol=1e-4)
            expected = z[own.images, :, latent].reshape(-1, *GRID) / strength.max()
            np.testing.assert_allclose(own.maps, expected, atol=1e-3)
            assert np.array_equal(own.pictures, run.store.pictures[own.images])
            assert own.prompts == [PROMPTS[i] for i in own.images]
        m = len(found["top"].evidence)
        expected = evidence[found["top"].images[:m], ..., latent].transpose(0, 2, 1)
        np.testing.assert_allclose(found["top"].evidence[:, :, 0], expected, rtol=2e-3, atol=2e-3)
        assert m == min(2, len(found["top"].images)) and not len(found["quantile"].evidence)


def test_steps_effects_and_neighbours_are_the_dictionarys(run, built):
    z, u = codes_of(run)[0], run.dictionary.directions()
    new = only_new(u, run.dictionary.coordinates)
    cosine = torch.nn.functional.cosine_similarity(u.flatten(1)[:, None], u.flatten(1)[None], -1)
    fires = (z > 0).reshape(-1, LATENTS)
    for latent in busy(run):
        record = built.record(latent)
        np.testing.assert_allclose(record.effect, u[latent].norm(dim=-1), rtol=1e-5)
        np.testing.assert_allclose(record.onset, new[latent].norm(dim=-1), rtol=1e-5)
        assert record.profile.sum() == pytest.approx(1) and record.steps == [0, 3, 9]
        others = [i for i in range(LATENTS) if i != latent]
        nearest = max(others, key=lambda i: float(cosine[latent, i]))
        first = record.nearest["by trajectory"][0]
        assert first.latent == nearest
        assert first.similarity == pytest.approx(float(cosine[latent, nearest]), abs=1e-5)
        both = {i: (fires[:, latent] & fires[:, i]).sum() for i in others}
        overlap = {
            i: n / np.sqrt(fires[:, latent].sum() * fires[:, i].sum() + 1e-12)
            for i, n in both.items()
        }
        found = record.nearest["by co-firing"]
        assert all(
            near.similarity == pytest.approx(overlap[near.latent], abs=1e-4) for near in found
        )
        if found:
            assert found[0].similarity == pytest.approx(max(overlap.values()), abs=1e-4)


def test_label_scores_are_aurocs_on_test_images(run, built):
    z = codes_of(run)[0]
    has = np.repeat(["red" in prompt for prompt in PROMPTS], 5)
    record = built.record(2)
    assert list(record.labels) == ["word=red"] and set(built.labels) == {2, 5}
    found = record.labels["word=red"]
    assert found.value == pytest.approx(roc_auc_score(has, z[..., 2].ravel()), abs=1e-6)
    assert found.low <= found.value <= found.high and found.low < found.high
    assert record.title == "word=red" and record.statistics["label score"] == found.value
    assert np.isnan(built.table["label score"][0]) and built.record(0).title == ""


def test_without_labels_there_are_no_scores(tmp_path):
    built = records.build(tiny_run(tmp_path, labels=False), counts=COUNTS)
    assert built.labels == {} and np.isnan(built.table["label score"]).all()


def test_a_latent_that_never_fires_has_a_record(tmp_path):
    run = tiny_run(tmp_path)
    run.dictionary.coder.threshold[7] = 1e9
    record = records.build(run, counts=COUNTS).record(7)
    assert record.statistics["firing rate"] == 0 and np.isnan(record.statistics["peak"])
    assert all(len(own.images) == len(own.maps) == 0 for own in record.examples.values())
    assert record.profile.tolist() == [0, 0, 0] and record.nearest["by co-firing"] == []


def test_maps_lie_in_files_of_bounded_size_with_the_same_contents(
    run, built, tmp_path, monkeypatch
):
    monkeypatch.setattr(records, "BLOCK", 5 * 2 * 5 * (9 + 4 * 3))  # five latents a file
    monkeypatch.setattr(stream, "PART", 1)  # evidence one latent at a time
    other = records.build(tiny_run(tmp_path), counts=COUNTS)
    names = sorted(p.name for p in other.folder.glob("maps-*"))
    assert names == [f"maps-{i:06d}.safetensors" for i in (0, 5, 10, 15)]
    np.testing.assert_allclose(other.array("profile"), built.array("profile"), rtol=1e-4)
    for latent in (4, 5, 15):
        for kind, own in other.record(latent).examples.items():
            expected = built.record(latent).examples[kind]
            assert np.array_equal(own.images, expected.images)
            assert np.array_equal(own.maps, expected.maps)
            assert np.array_equal(own.evidence, expected.evidence)


def test_what_is_made_is_kept_and_what_is_missing_made(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "BLOCK", 8 * 2 * 5 * (9 + 4 * 3))  # two files
    run = tiny_run(tmp_path)
    folder = records.build(run, counts=COUNTS).folder
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    (folder / "maps-000008.safetensors").unlink()
    monkeypatch.setattr(stream, "watch", lambda *_: pytest.fail("the index was there"))
    records.build(run, counts=COUNTS)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    kept = {n for n, t in times.items() if (folder / n).stat().st_mtime_ns == t}
    assert kept == {"index.safetensors", "maps-000000.safetensors"}


def test_records_of_changed_files_are_refused_and_made_again(tmp_path):
    run = tiny_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished records; build them"):
        records.load(run)
    records.build(run, counts=COUNTS)
    run.made["sae"] = "another"
    with pytest.raises(ValueError, match="^sae has changed since the records"):
        records.load(run)
    assert records.build(run, counts=COUNTS).about["sae"] == "another"


def test_names_and_strips_are_shown_where_there_are_any(tmp_path):
    run = tiny_run(tmp_path)
    folder = records.build(run, counts=COUNTS).folder
    save_json(folder / "names.json", {"3": {"name": "stripes", "score": [0.8, 0.7, 0.9]}})
    images = np.linspace(0, 1, 2 * 6 * 7 * 3).reshape(2, 6, 7, 3)
    save_strip(folder / "strips" / "3.safetensors", Strip(np.array([-1.0, 1]), images, "a cat"))
    built = records.load(run)
    record, plain = built.record(3), built.record(4)
    assert record.name == Name("stripes", (0.8, 0.7, 0.9)) and record.title == "stripes"
    assert record.strip.strengths.tolist() == [-1, 1] and record.strip.prompt == "a cat"
    np.testing.assert_allclose(record.strip.images, images, atol=1 / 255)
    assert plain.name is None and plain.strip is None
    with pytest.raises(ValueError, match="latent is 16; it must be from 0 to 15"):
        built.record(16)


def test_names_are_added_and_those_of_another_dictionary_are_not_shown(tmp_path):
    run = tiny_run(tmp_path)
    records.build(run, counts=COUNTS)
    records.save_names(run, "residual", {3: Name("stripes")})
    path = records.save_names(run, "residual", {3: Name("dots"), 12: Name("cats")})
    assert records.load(run).names == {3: Name("dots"), 12: Name("cats")}
    records.save_names(run, "residual", {3: Name("stripes", Estimate(0.8, 0.7, 0.9))})
    found = records.load(run)
    assert found.table["name score"][[3, 12]].tolist() == pytest.approx([0.8, np.nan], nan_ok=True)
    run.made["sae"] = "another"
    assert records.build(run, counts=COUNTS).names == {}
    assert records.save_names(run, "residual", {1: Name("dogs")}) == path
    assert records.load(run).names == {1: Name("dogs")}


def test_a_baseline_has_records_of_its_own(tmp_path):
    run = tiny_run(tmp_path)
    run.made["raw concat"] = "r"
    run.baseline = {"raw concat": run.dictionary}.get
    built = records.build(run, "raw concat", counts=COUNTS)
    assert built.folder == tmp_path / "records" / "raw_concat" and set(built.labels) == {1}


def test_codes_for_measuring_are_those_of_the_first_images(run):
    z = codes_of(run)[0]
    x = run.predictors.standardise(run.store.h.transpose(1, 2))
    limit = int((z[:4] > 0).sum())
    seen = stream.watch(run.dictionary, [x], N, COUNTS, n_codes=limit)
    assert seen.codes.n_images == 4
    np.testing.assert_allclose(seen.codes.of(2), z[:4, :, 2], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seen.strength.toarray(), z[:4].max(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seen.fired, (z > 0).any(1).mean(0))


def test_a_latents_labels_come_best_first(tmp_path):
    own = {f"word={colour}": {"residual": 4} for colour in ("blue", "green", "red")}
    run = tiny_run(tmp_path, latents={"best": own, "labels": {}})
    scores = records.build(run, counts=COUNTS).labels[4]
    values = [score.value for score in scores.values()]
    assert values == sorted(values, reverse=True) and list(scores) != sorted(scores)


def test_a_label_stands_above_a_name_that_may_be_chance():
    labels = {"word=red": Estimate(0.7, 0.6, 0.8), "word=blue": Estimate(0.6, 0.5, 0.7)}
    good, doubtful = (Name("stripes", Estimate(0.7, low, 0.9)) for low in (0.6, 0.5))
    assert title(good, labels) == title(Name("stripes"), labels) == "stripes"
    assert title(doubtful, labels) == title(None, labels) == "word=red"
    assert title(doubtful, {}) == "stripes" and title(None, {}) == ""
