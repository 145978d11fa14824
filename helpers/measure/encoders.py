"""What images show where nobody knows: judged by CLIP, SigLIP 2, DINOv2 or another encoder.

An encoder puts images, and most put texts, on one sphere, where like things lie close together. It
is a weaker witness than the demo world's reader: it prefers some words and styles, and counts
badly. So it is held against what is known of the run's own images, their prompts, before it judges.
"""

import numpy as np
import torch
from PIL import Image

from helpers.checks import choose_device, refuse
from helpers.measure import metrics
from helpers.measure.words import Words
from helpers.pipelines.loading import no_bars_for_weights


class Encoder:
    """A model of `transformers` with an image encoder and perhaps a text encoder."""

    def __init__(self, model, processor):
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.reads_text = hasattr(model, "get_text_features")

    @classmethod
    def load(cls, name: str, device: str = "auto", parameter: str = "judge") -> "Encoder":
        """By its name on the hub or a folder, in float32; ValueError if there is no such encoder.

        As openai/clip-vit-large-patch14, google/siglip2-base-patch16-224, facebook/dinov2-base;
        `parameter` is what an error calls it.
        """
        from transformers import AutoModel, AutoProcessor

        return cls(*_loaded(name, AutoModel, AutoProcessor, device, parameter))

    @torch.no_grad()
    def images(self, images: np.ndarray) -> torch.Tensor:
        """Unit vectors (image, d) of images (image, height, width, 3) in [0, 1]."""
        found = []
        for start in range(0, len(images), 32):
            inputs = self.processor(images=_pictures(images[start : start + 32]), **TENSORS)
            inputs = inputs.to(self.model.device)
            encode = self.model.get_image_features if self.reads_text else self.model
            found.append(_unit(encode(**inputs)))
        return torch.cat(found)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors (text, d); what is longer than the encoder reads is cut off."""
        if not self.reads_text:
            refuse("judge", type(self.model).__name__, "one that reads texts, as CLIP and SigLIP 2")
        # padded in full, and its mask left out: SigLIP was trained so, and CLIP looks only ahead
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        found = self.processor(text=[t.lower() for t in texts], **options, **TENSORS)
        return _unit(self.model.get_text_features(found["input_ids"].to(self.model.device)))


class Judge(Words):
    """Targets as an encoder sees them in images; what the prompts say stays the labels' source.

    A target is there when an image is nearer to the target's text than to its source's by more than
    `level`. `calibrate` sets that level for words, and what counts as nothing kept.
    """

    def __init__(self, encoder: Encoder, prompts=(), texts: dict | None = None, lpips=None):
        """`texts`: target -> (its text, its source's), beside words', 'a photo of dog' and so on.

        `lpips` is a `helpers.measure.lpips.LPIPS`, or None to leave that distance out.
        """
        super().__init__(prompts)
        self.encoder, self.lpips = encoder, lpips
        self.level, self.floor, self.auroc = {}, 0.0, {}
        own = {f"word={word}": (f"a photo of {word}", "a photo") for word in self._words}
        self.texts = (own | (texts or {})) if encoder.reads_text else {}

    def calibrate(self, prompts: list[str], images: np.ndarray) -> "Judge":
        """Set what the judge goes by from images whose prompts are known; returns itself.

        A word's level is halfway between images whose prompts have it and the others; `auroc` says
        how well the encoder tells the two apart, and so what its word is worth. The floor of 'kept'
        is the mean similarity of two different images.
        """
        x, labels = self.encoder.images(images), self.labels(prompts, images, (1, 1))
        n = len(x)
        if n > 1:
            self.floor = float(((x @ x.T).sum() - n) / (n * (n - 1)))
        for target, own in zip(labels.names, labels.at_tokens()[:, 0].T):
            if target in self.texts and 0 < own.sum() < n:
                margin = self._margin(x, target)
                self.level[target] = float(margin[own].mean() + margin[~own].mean()) / 2
                resampled = metrics.resampled_auroc(margin, own, np.arange(n), n)
                self.auroc[target] = metrics.of_resampled(resampled)
        return self

    def outcome(self, target: str, before: np.ndarray, after: np.ndarray) -> dict:
        """What steering towards a target did to images, each (image,).

        'success', bool: the target is there; 'kept': similarity to the image before, from 0 at the
        floor to 1. As pairs of sums and weights: 'text gain', how much nearer to the target's text
        (ΔCLIP-T), 'LPIPS' to the image before, and their ratio. Left out is what cannot be had.
        """
        x, y = self.encoder.images(before), self.encoder.images(after)
        alike, one = (x * y).sum(1).cpu().numpy(), np.ones(len(x))
        found = {"kept": np.clip((alike - self.floor) / (1 - self.floor), 0, 1)}
        if target in self.texts:
            wanted = self.encoder.texts(self.texts[target][:1])[0]
            gain = ((y - x) @ wanted).double().cpu().numpy()
            found |= {"success": self._shows(y, target), "text gain": (gain, one)}
        if self.lpips is not None:
            found["LPIPS"] = self.lpips(before, after), one
        if {"LPIPS", "text gain"} <= set(found):
            found["text gain / LPIPS"] = gain, found["LPIPS"][0]
        return found

    def has(self, target: str, images: np.ndarray) -> np.ndarray:
        """Whether images show the target, bool, (image,); all do, if no text can say."""
        if target not in self.texts:
            return super().has(target, images)
        return self._shows(self.encoder.images(images), target)

    def steerable(self, target: str, images: np.ndarray, grid: tuple[int, int]):
        """Images that do not show the target yet, bool, (image,), at all their tokens."""
        every, weights = super().steerable(target, images, grid)
        return (~self.has(target, images) if target in self.texts else every), weights

    def _margin(self, x: torch.Tensor, target: str) -> np.ndarray:
        wanted, source = self.encoder.texts(list(self.texts[target]))
        return (x @ (wanted - source)).double().cpu().numpy()

    def _shows(self, x: torch.Tensor, target: str) -> np.ndarray:
        return self._margin(x, target) > self.level.get(target, 0.0)


class Segmenter:
    """CLIPSeg (Lüddecke & Ecker 2022, arXiv:2112.10003): where in an image a text's thing is."""

    def __init__(self, model, processor):
        self.model, self.processor = model.eval().requires_grad_(False), processor

    @classmethod
    def load(cls, name: str = "CIDAS/clipseg-rd64-refined", device: str = "auto") -> "Segmenter":
        """By its name on the hub, or a folder."""
        from transformers import AutoProcessor, CLIPSegForImageSegmentation

        return cls(*_loaded(name, CLIPSegForImageSegmentation, AutoProcessor, device, "masks"))

    @torch.no_grad()
    def __call__(self, image: np.ndarray, text: str) -> np.ndarray:
        """Mask, bool, (height, width) of an image (height, width, 3): probability above a half."""
        options = {"padding": True, "truncation": True} | TENSORS
        inputs = self.processor(text=[text], images=_pictures(image[None]), **options)
        logits = self.model(**inputs.to(self.model.device)).logits
        logits = logits.reshape(1, 1, *logits.shape[-2:])
        logits = torch.nn.functional.interpolate(logits, image.shape[:2], mode="bilinear")
        return (logits[0, 0] > 0).cpu().numpy()


TENSORS = {"return_tensors": "pt"}


def _loaded(name: str, kind, processor, device: str, parameter: str):
    device = choose_device(device)
    no_bars_for_weights()
    try:
        model = kind.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        return model.to(device), processor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        refuse(parameter, name, f"a folder or hub name that transformers can load ({reason})")


def _pictures(images: np.ndarray) -> list[Image.Image]:
    pixels = (np.clip(np.asarray(images), 0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(p) for p in pixels]


def _unit(found) -> torch.Tensor:
    """Rows of unit length, of what a model gives for one input a row."""
    found = getattr(found, "pooler_output", found)
    return torch.nn.functional.normalize(found.float(), dim=-1)
