import numpy as np
import pytest

from helpers.measure.words import Words

IMAGES = np.zeros((4, 2, 2, 3))


def labels(prompts, grid=(1, 3)):
    return Words(prompts).labels(prompts, IMAGES, grid)


def test_words_are_those_neither_rare_nor_everywhere():
    animals = ["a photo of a Dog, dog", "a photo of a cat", "a photo of a bird"]
    made = labels([*animals, "a photo of a dog and an ox"])
    assert set(made.names) == {"word=dog", "word=cat", "word=bird", "word=and"}
    dog = made.at_tokens()[:, :, made.names.index("word=dog")]
    assert dog.tolist() == [[True] * 3, [False] * 3, [False] * 3, [True] * 3]
    assert made.among("word=dog").all()


def test_a_word_of_one_prompt_in_thirty_is_rare():
    assert labels(["dog"] * 15 + ["cat"] * 14 + ["bird"]).names == ["word=cat", "word=dog"]


def test_only_the_twenty_commonest_words_are_taken():
    letters = "abcdefghijklmnopqrstuvwxyz"
    prompts = [f"word{a} word{b}" for a, b in zip(letters[:13], letters[13:])]
    assert len(labels(prompts).names) == 20
    assert "word=wordz" in labels(["wordz worda", *prompts[1:]]).names


def test_every_split_has_the_labels_of_the_whole_run():
    truth = Words(["dog", "dog cat", "cat", "bird", "x"])
    made = truth.labels(["a cat", "an ox"], IMAGES[:2], (1, 1))
    assert made.names == ["word=bird", "word=cat", "word=dog"]
    assert made.at_tokens()[:, 0].tolist() == [[False, True, False], [False] * 3]


def test_classes_by_number_are_words_too():
    assert set(labels(["207", "3", "207", "9"]).names) == {"word=207", "word=3", "word=9"}


@pytest.mark.parametrize("prompts", [["", "", ""], ["a dog", "a dog", "a dog"]])
def test_without_telling_words_there_are_no_labels(prompts):
    made = labels(prompts, (3, 2))
    assert made.names == [] and made.at_tokens().shape == (3, 6, 0)


def test_of_images_themselves_words_know_nothing():
    truth = Words([])
    assert truth.judged(["a"], IMAGES) == {} == truth.objects_kept(IMAGES, IMAGES)
    assert truth.outcome("word=dog", IMAGES, IMAGES) == {}
    assert truth.steering_prompts(2, 0, ["a", "b", "c"]) == ["a", "b"]
    usable, weights = truth.steerable("word=dog", IMAGES, (2, 3))
    assert usable.tolist() == [True] * 4 == truth.has("word=dog", IMAGES).tolist()
    assert weights.shape == (4, 6) and (weights == 1).all()
