"""Vision-language models to ask: any OpenAI-compatible server, or one in this process.

A backend has a `model`, its name, and `ask(prompt, images, schema, attempt)`, which gives an
`Answer`: text that ought to be JSON of that schema, unchecked. A server is asked through the HTTP
client of `huggingface_hub`, not its `InferenceClient`: that one, given a `base_url` and no key,
sends the reader's hub token to it, and writes `json_schema` as a `json_object` that is not OpenAI's
(seen in 2.4). Keys are read from the environment, sent, and written nowhere.
"""

import base64
import io
import os
import random
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
from huggingface_hub import get_session
from huggingface_hub.errors import HTTPError
from PIL import Image

from helpers.checks import choose_device, in_range, positive, refuse

SIDES = 224, 1024  # least pixels of an image's shorter side, most of its longer, as it is sent
LONGEST_WAIT = 60.0  # seconds between two tries
PASSING = (408, 409, 425, 429)  # statuses that may pass, as all from 500 on may


@dataclass(frozen=True)
class Answer:
    """What a model said, and the tokens that it took."""

    text: str
    tokens: tuple[int, int] = (0, 0)  # read and written, as the server counts them
    refused: str = ""  # why there is no text, where a model or a filter said so


def pictures(images) -> list[Image.Image]:
    """Images (image, height, width, 3 or 1) in [0, 1] as they are sent, 8 bits a channel.

    Small ones are enlarged by a whole number, so that every pixel stays visible; see `SIDES`.
    """
    images = np.asarray(images)
    pixels = (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
    least, most = SIDES
    times = max(1, -(-least // min(pixels.shape[1:3])))
    size = pixels.shape[2] * times, pixels.shape[1] * times  # width, height
    too_long = max(size) > most
    if too_long:
        size = tuple(max(1, round(side * most / max(size))) for side in size)
    how = Image.Resampling.BOX if too_long else Image.Resampling.NEAREST
    return [Image.fromarray(np.ascontiguousarray(p)).resize(size, how) for p in pixels]


def _data_uri(picture: Image.Image) -> str:
    held = io.BytesIO()
    picture.save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


class Server:
    """A model behind an OpenAI-compatible address: vLLM, `transformers serve`, hosted models."""

    def __init__(
        self, model: str, base_url: str, key="", *, timeout=120.0, retries=6, wait=1.0, options=None
    ):
        """`key` names the environment variable that holds the key; '' sends none.

        `timeout` and `wait`, which doubles with each of the `retries`, are seconds. `options` go
        into each request, as {'max_tokens': 200}; one that is None is left out of it. ValueError
        for an address that is none, or holds a password or a key itself; neither is repeated.
        """
        if not model or not isinstance(model, str):
            refuse("model", model, "the name by which the server knows a model")
        self.model, self.url, self.key = model, _address(base_url), key
        if key and not os.environ.get(key):
            raise ValueError("key must be the name of an environment variable that holds the key")
        self.timeout, self.wait = positive("timeout", timeout), positive("wait", wait)
        self.retries = in_range("retries", retries, 0)
        self.options = options or {}

    def ask(self, prompt: str, images, schema: dict, attempt: int = 0) -> Answer:
        """One question about images; ConnectionError where no answer came after all retries.

        The first attempt is at temperature 0, later ones at 0.7 and with other seeds.
        """
        seen = [{"type": "image_url", "image_url": {"url": _data_uri(p)}} for p in pictures(images)]
        form = {"name": "reply", "strict": True, "schema": schema}
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*seen, {"type": "text", "text": prompt}]}],
            "response_format": {"type": "json_schema", "json_schema": form},
            "temperature": 0.7 if attempt else 0.0,
            "seed": attempt,
            "max_tokens": 1000,
        }
        body = {k: v for k, v in (body | self.options).items() if v is not None}
        return _answer(self._post(body))

    def _post(self, body: dict) -> dict:
        """The server's JSON, asked again after 429, 5xx, time-outs and broken replies."""
        why = ""
        for tried in range(self.retries + 1):
            found, why, asked_to_wait = self._try(body)
            if found is not None:
                return found
            if tried < self.retries:
                doubled = self.wait * 2**tried * random.uniform(0.5, 1)
                time.sleep(min(max(doubled, asked_to_wait), LONGEST_WAIT))
        cure = "run it again later, what was answered is kept"
        raise ConnectionError(f"{self.url} gave no answer {tried + 1} times ({why}); {cure}")

    def _try(self, body: dict) -> tuple[dict | None, str, float]:
        """What came, or None, why, and the seconds that the server asks to wait."""
        held = os.environ.get(self.key, "").strip() if self.key else ""
        headers = {"Authorization": f"Bearer {held}"} if held else {}
        options = {"headers": headers, "timeout": self.timeout}
        try:
            response = get_session().post(self.url, json=body, **options)
            found = response.json() if response.status_code == 200 else None
        except HTTPError as error:  # time-outs and lost connections
            return None, _without(held, str(error)) or type(error).__name__, 0.0
        except ValueError:
            return None, "it answered what is no JSON", 0.0
        if isinstance(found, dict) and found.get("choices"):
            return found, "", 0.0
        why = f"status {response.status_code}: {_without(held, response.text)[:200]}"
        status = response.status_code
        if status != 200 and status < 500 and status not in PASSING:
            cure = "check model, key and options"
            raise ConnectionError(f"{self.url} does not take the question ({why}); {cure}")
        return None, why, _seconds(response.headers.get("Retry-After"))


def _without(key: str, text: str) -> str:
    """A text in which the key, should it be in it, is not."""
    return text.replace(key, "…") if key else text


def _address(base_url: str) -> str:
    parts = urlsplit(str(base_url))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        refuse("base_url", base_url, "an address such as 'http://localhost:8000/v1'")
    if parts.username or parts.password or parts.query:
        raise ValueError("base_url holds a password or a query; give the key by its environment")
    return str(base_url).rstrip("/") + "/chat/completions"


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.0, float(retry_after))
    except (TypeError, ValueError):  # there is none, or it is a date
        return 0.0


def _answer(made: dict) -> Answer:
    usage = made.get("usage") or {}
    tokens = tuple(int(usage.get(f"{side}_tokens") or 0) for side in ("prompt", "completion"))
    choice = made["choices"][0]
    message = (choice.get("message") if isinstance(choice, dict) else None) or {}
    refused = message.get("refusal") or ""
    if choice.get("finish_reason") == "content_filter":
        refused = refused or "the server's filter kept the reply back"
    content = message.get("content")
    return Answer(content if isinstance(content, str) else "", tokens, str(refused))


class Local:
    """A model of `transformers` in this process; nothing holds it to the schema but the prompt."""

    def __init__(self, model: str, pipe, max_new_tokens: int = 1000):
        """`pipe` is a `transformers` pipeline for 'image-text-to-text'."""
        self.model, self.pipe, self.max_new_tokens = model, pipe, max_new_tokens

    @classmethod
    def load(cls, model: str, device: str = "auto", **options) -> "Local":
        """By its name on the hub, or a folder, as safetensors; ValueError if it cannot be."""
        from transformers import pipeline  # takes a second to import

        weights = {"dtype": "auto", "model_kwargs": {"use_safetensors": True}}
        try:
            pipe = pipeline("image-text-to-text", model, device=choose_device(device), **weights)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            refuse("model", model, f"a folder or hub name that answers about images ({reason})")
        return cls(model, pipe, **options)

    def ask(self, prompt: str, images, schema: dict, attempt: int = 0) -> Answer:
        """One question about images; tokens are those of the texts, not of the images.

        The first attempt is greedy, later ones are sampled, each from its own seed.
        """
        import torch

        seen = [{"type": "image", "image": p} for p in pictures(images)]
        chat = [{"role": "user", "content": [*seen, {"type": "text", "text": prompt}]}]
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": attempt > 0}
        with torch.random.fork_rng():
            torch.manual_seed(attempt)
            made = self.pipe(text=chat, return_full_text=False, generate_kwargs=options)
        text = made[0]["generated_text"]
        tokens = (len(self.pipe.tokenizer(t)["input_ids"]) for t in (prompt, text))
        return Answer(text, tuple(tokens))
