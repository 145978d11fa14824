import numpy as np
import pytest
import torch
from encoders import encoder, parts

from helpers.measure import effects
from helpers.measure.encoders import Encoder, Judge, Segmenter

ENCODERS = ("clip", "siglip", "dino")
IMAGES = np.random.default_rng(0).random((3, 40, 48, 3), np.float32)


class Colours:
    """An encoder that sees an image's mean colour, and knows three words and what has none."""

    reads_text = True
    words = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "photo": (1, 1, 1)}

    def images(self, images):
        return self._unit(torch.from_numpy(images).double().mean((1, 2)))

    def texts(self, texts):
        found = [self.words[text.split()[-1]] for text in texts]
        return self._unit(torch.tensor(found, dtype=torch.float64))

    def _unit(self, x):
        return x / x.norm(dim=1, keepdim=True)


class Blind(Colours):
    """One that sees the same in all images."""

    def images(self, images):
        return super().images(np.ones_like(images))


class Mute(Colours):
    """One that reads no text, as DINOv2."""

    reads_text = False


def plain(*colours):
    """Images of one colour each."""
    return np.tile(np.array(colours, np.float32)[:, None, None], (1, 32, 32, 1))


RED, GREEN, BLUE, GREY = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.5)
PROMPTS = ["red", "red", "green", "blue", "blue", "green"]
SHOWN = plain(RED, (0.9, 0.1, 0.1), GREEN, BLUE, (0.1, 0.1, 0.8), (0.2, 0.9, 0.1))


# --- encoders ---


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_saved_encoder_is_loaded_and_gives_unit_vectors(kind, tmp_path):
    model, processor = parts(kind)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = Encoder.load(str(tmp_path), "cpu").images(IMAGES)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found, encoder(kind).images(IMAGES))


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_images_vector_is_the_models_pooled_output_whatever_its_batch(kind):
    model, processor = parts(kind)
    many = encoder(kind).images(np.concatenate([IMAGES] * 11)[:33])
    whole = (IMAGES[2] * 255).round().astype(np.uint8)
    pixels = processor(images=[whole], return_tensors="pt")["pixel_values"]
    vision = model.eval() if kind == "dino" else model.eval().get_image_features
    with torch.no_grad():
        expected = vision(pixels).pooler_output[0]
    torch.testing.assert_close(many[32], expected / expected.norm())
    assert (many[0] - many[1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ("clip", "siglip"))
def test_texts_are_read_in_small_letters_and_cut_where_the_encoder_stops(kind):
    found = encoder(kind).texts(["a Dog", "a dog", "a dog " * 40, "two cats"])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    assert (found[1] - found[3]).abs().max() > 1e-4
    torch.testing.assert_close(encoder(kind).texts(["two cats"])[0], found[3])


def test_an_encoder_without_words_reads_none():
    assert not encoder("dino").reads_text
    with pytest.raises(ValueError, match="judge is 'Dinov2Model'.*reads texts"):
        encoder("dino").texts(["a dog"])


@pytest.mark.parametrize("kind", (Encoder, Segmenter))
def test_what_is_no_encoder_is_refused_in_one_sentence(kind, tmp_path):
    name = "judge" if kind is Encoder else "masks"
    with pytest.raises(ValueError, match=f"^{name} is .*transformers can load") as refused:
        kind.load(str(tmp_path), "cpu")
    assert "\n" not in str(refused.value)


def test_a_segmenters_mask_is_where_the_decoder_says_yes_at_the_images_size():
    model, processor = parts("clipseg")
    image = IMAGES[0][:32, :32]
    whole = (image * 255).round().astype(np.uint8)
    inputs = processor(text=["a dog"], images=[whole], return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits.reshape(32, 32)
    assert encoder("clipseg")(image, "a dog").tolist() == (logits > 0).tolist()
    found = encoder("clipseg")(IMAGES[0], "a dog")
    assert found.shape == (40, 48) and found.dtype == bool


# --- a judge ---


def test_an_outcome_worked_by_hand():
    judge = Judge(Colours(), PROMPTS)
    before, after = plain(GREEN, GREEN, GREY), plain(GREEN, (1, 1, 0), RED)
    found = judge.outcome("word=red", before, after)
    assert found["success"].tolist() == [False, False, True]  # yellow is nearer to grey than to red
    half, third = 0.5**0.5, 3**-0.5
    np.testing.assert_allclose(found["kept"], [1, half, third], atol=1e-6)
    np.testing.assert_allclose(found["text gain"][0], [0, half, 1 - third], atol=1e-6)
    assert found["text gain"][1].tolist() == [1, 1, 1] and set(found) == {
        *("success", "kept", "text gain")
    }


def test_a_judge_has_its_own_words_for_targets_that_are_given():
    judge = Judge(Colours(), PROMPTS, {"season=autumn": ("a wood in red", "a wood in green")})
    made = judge.outcome("season=autumn", plain(GREEN, GREEN), plain((1, 0.9, 0), (0.9, 1, 0)))
    assert made["success"].tolist() == [True, False]
    assert judge.has("season=autumn", plain(RED, GREEN)).tolist() == [True, False]


def test_calibrated_levels_lie_halfway_and_tell_how_far_to_trust_them():
    judge = Judge(Colours(), PROMPTS).calibrate(PROMPTS, SHOWN)
    x = Colours().images(SHOWN).numpy()
    margin = x @ (np.array([1, 0, 0]) - np.full(3, 3**-0.5))
    expected = (margin[:2].mean() + margin[2:].mean()) / 2
    assert judge.level["word=red"] == pytest.approx(expected, abs=1e-6)
    assert judge.auroc["word=red"].value == 1
    others = [x[i] @ x[j] for i in range(6) for j in range(6) if i != j]
    assert judge.floor == pytest.approx(np.mean(others), abs=1e-6)
    usable, weights = judge.steerable("word=red", SHOWN, (2, 2))
    assert usable.tolist() == [False, False, True, True, True, True]
    assert weights.shape == (6, 4) and (weights == 1).all()
    assert judge.has("word=red", SHOWN).tolist() == (~usable).tolist()


def test_a_judge_that_sees_nothing_is_no_better_than_a_guess():
    judge = Judge(Blind(), PROMPTS).calibrate(PROMPTS, SHOWN)
    assert {e.value for e in judge.auroc.values()} == {0.5} and len(judge.auroc) == 3
    assert not judge.outcome("word=red", SHOWN, SHOWN[::-1])["success"].any()


def test_what_is_kept_counts_from_how_alike_different_images_are():
    judge = Judge(Colours(), PROMPTS)
    judge.floor = 0.5
    found = judge.outcome("word=red", plain(GREEN, GREEN, GREEN), plain(GREEN, (1, 1, 0), RED))
    np.testing.assert_allclose(found["kept"], [1, 2 * 0.5**0.5 - 1, 0], atol=1e-6)


def test_an_encoder_without_words_says_only_what_was_kept():
    judge = Judge(Mute(), PROMPTS).calibrate(PROMPTS, SHOWN)
    assert set(judge.outcome("word=red", SHOWN, SHOWN)) == {"kept"} and judge.auroc == {}
    assert judge.has("word=red", SHOWN).all()
    assert judge.steerable("word=red", SHOWN, (1, 1))[0].all()
    measured = effects.measure(judge, "word=red", SHOWN, SHOWN, np.ones((6, 1)), (1, 1))
    assert set(measured) == {"kept", "inside", "outside"}
    assert effects.headline(effects.summary(measured)) == ("inside", "outside")


def test_effects_are_measured_by_a_judge_as_by_a_reader():
    def lpips(before, after):
        return abs(after - before).mean((1, 2, 3))

    judge = Judge(Colours(), PROMPTS, lpips=lpips)
    before, after = plain(GREEN, GREEN), plain(GREEN, RED)
    measured = effects.measure(judge, "word=red", before, after, np.ones((2, 1)), (1, 1))
    found = effects.summary(measured)
    assert (found["success"].value, found["kept"].value, found[effects.GAIN].value) == (0.5, 0.5, 0)
    assert found["text gain"].value == pytest.approx(0.5)
    assert found["LPIPS"].value == pytest.approx((0 + 2 / 3) / 2)
    assert found["text gain / LPIPS"].value == pytest.approx(1 / (2 / 3))
    both = effects.summary(effects.joined([measured, measured]))
    assert both["text gain / LPIPS"].value == pytest.approx(1 / (2 / 3))
    assert effects.left_over(measured)["still there"].value == 0.5


@pytest.mark.parametrize("kind", ("clip", "siglip"))
def test_a_real_encoder_of_random_weights_judges_without_a_network(kind):
    judge = Judge(encoder(kind), PROMPTS).calibrate(PROMPTS, SHOWN)
    found = judge.outcome("word=red", SHOWN, SHOWN)
    np.testing.assert_allclose(found["kept"], 1, atol=1e-5)
    np.testing.assert_allclose(found["text gain"][0], 0, atol=1e-5)
    assert found["success"].tolist() == judge.has("word=red", SHOWN).tolist()


def test_labels_stay_those_of_the_prompts():
    judge = Judge(Colours(), PROMPTS)
    made = judge.labels(PROMPTS, SHOWN, (1, 2))
    assert made.names == ["word=blue", "word=green", "word=red"]
    assert made.at_tokens()[0].tolist() == [[False, False, True]] * 2
