"""What is known of images without a reader: the words of their prompts.

`helpers.demo.truth.Scenes` has the same methods for images of the demo world, whose content can be
read. A word counts for every token of its image: a much weaker truth, and nothing can be judged.
"""

import numpy as np

from helpers.measure.labels import Labels


class Words:
    """Labels are the commonest 20 words that a twentieth to half of all the run's prompts have.

    Numbers of classes are words. Without prompts, or with words that all share, there are none.
    """

    def __init__(self, prompts=()):
        from sklearn.feature_extraction.text import CountVectorizer  # takes a second to import

        self._counter = CountVectorizer(
            token_pattern=r"[a-z]{3,}|\d+", binary=True, min_df=0.05, max_df=0.5, max_features=20
        )
        try:
            self._words = list(self._counter.fit(prompts).get_feature_names_out())
        except ValueError:  # scikit-learn's way to say that no word is left
            self._words = []

    def labels(self, prompts: list[str], images: np.ndarray, grid: tuple[int, int]) -> Labels:
        """Words of each image's prompt, at all its tokens."""
        n, names = len(prompts), [f"word={word}" for word in self._words]
        owner = np.repeat(np.arange(n)[:, None], grid[0] * grid[1], axis=1)
        has = np.zeros((n, 0), bool)
        if names:
            has = self._counter.transform(prompts).toarray().astype(bool)
        return Labels(names, owner, has, kind=np.zeros(n, int))

    def judged(self, *what) -> dict[str, np.ndarray]:
        """Nothing: what an image shows cannot be read, nor what steering did to it."""
        return {}

    objects_kept = outcome = judged

    def steering_prompts(self, n: int, seed: int, given: list[str]) -> list[str]:
        """The first n of the given prompts: fresh ones cannot be made up."""
        return given[:n]

    def steerable(self, target: str, images: np.ndarray, grid: tuple[int, int]):
        """Every image, bool, (image,), at all its tokens, weights (image, token) of 1."""
        return np.ones(len(images), bool), np.ones((len(images), grid[0] * grid[1]))

    def has(self, target: str, images: np.ndarray) -> np.ndarray:
        """True for every image, (image,): there is nothing to choose by."""
        return np.ones(len(images), bool)
