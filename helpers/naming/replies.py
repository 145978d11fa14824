"""Questions to a vision-language model, each asked once: prompts, replies on disk, and the bill.

A reply is one JSON file, named after what it depends on: feature, prompt, model and images. A run
that was killed asks only for what is missing. Each reply is held against what was asked for; one
that never fits, or is refused, is kept as unanswered, so that it is not paid for again. Delete its
file to ask again.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np

from helpers.checks import in_range, one_of
from helpers.files import load_json, save_json
from helpers.naming.backends import Answer, pictures

PROMPTS = Path(__file__).parent / "prompts"
LONGEST_NAME = 200  # characters
TEXT, TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
FORMS = {  # what each kind of question asks for
    "describe": {"patterns": TEXT, "name": TEXT},
    "judge": {"score": {"type": "integer"}},
    "locate": {"score": {"type": "integer"}},
    "write": {"should": TEXTS, "should_not": TEXTS},
}
UNSEEN = np.zeros((0, 1, 1, 3), np.float32)  # for a question without images


def prompt(kind: str, **values) -> str:
    """The text of `prompts/<kind>.txt` with its $names replaced."""
    one_of("kind", kind, FORMS)
    return Template((PROMPTS / f"{kind}.txt").read_text().strip()).substitute(values)


def schema(kind: str) -> dict:
    """JSON schema of a reply; ranges and lengths are left to `checked`: servers differ in them."""
    form = FORMS[kind]
    return {
        "type": "object",
        "properties": form,
        "required": list(form),
        "additionalProperties": False,
    }


def read(text: str) -> dict:
    """The last JSON object in a reply, in a fence or after words or not; ValueError for none."""
    found, start = None, text.find("{")
    while start >= 0:
        try:
            found, end = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError:
            end = start + 1
        start = text.find("{", end)
    if found is None:
        raise ValueError(f"no JSON object in {text[:80]!r}")
    return found


def checked(kind: str, reply: dict, n: int = 1) -> dict:
    """A reply's parts in the form asked for, lists cut to n; else ValueError says what is wrong."""
    found = {}
    for name, form in FORMS[kind].items():
        value = reply.get(name)
        if form is TEXT:
            value = _text(name, value)
        elif form is TEXTS:
            if not isinstance(value, list) or len(value) < n:
                raise ValueError(f"{name} is {value!r:.80}, not a list of {n} texts")
            value = [_text(name, v) for v in value[:n]]
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} is {value!r:.80}, not a number")
        else:
            value = float(in_range(name, value, 0, 100))
        found[name] = value
    if kind == "describe" and len(found["name"]) > LONGEST_NAME:
        raise ValueError(f"name has {len(found['name'])} characters, more than {LONGEST_NAME}")
    return found


def _text(name: str, value) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {value!r:.80}, not a text")
    return " ".join(value.split())


@dataclass(frozen=True)
class Replies:
    """What one model says about features, kept in a folder."""

    backend: object  # with `model` and `ask`, as in `helpers.naming.backends`
    folder: Path
    attempts: int = 3  # to get a reply of the right form

    def ask(self, feature: int, kind: str, images=UNSEEN, n: int = 1, **values) -> dict | None:
        """The reply to one question, from disk or from the model; None if it gave none.

        ConnectionError where the server cannot be reached: nothing is written then.
        """
        text = prompt(kind, n=n, **values)
        digests = [hashlib.sha256(_pixels(p)).hexdigest()[:16] for p in pictures(images)]
        asked = {"feature": int(feature), "kind": kind, "model": self.backend.model}
        asked |= {"prompt": text, "images": digests}
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(self.folder) / str(int(feature)) / f"{kind}-{key}.json"
        if path.exists():
            record = load_json(path)
            return None if record["reply"] is None else checked(kind, record["reply"], n)
        record = asked | self._answered(text, images, kind, n)
        save_json(path, record)
        return record["reply"]

    def _answered(self, text: str, images, kind: str, n: int) -> dict:
        """Ask until a reply fits; the record of it, with all tokens that it took."""
        tokens, why = np.zeros(2, int), ""
        for attempt in range(in_range("attempts", self.attempts, 1)):
            answer: Answer = self.backend.ask(text, images, schema(kind), attempt)
            tokens += answer.tokens
            spent = {"calls": attempt + 1, "tokens": tokens.tolist()}
            if answer.refused:
                return {"reply": None, "why": f"refused: {answer.refused[:200]}"} | spent
            try:
                return {"reply": checked(kind, read(answer.text), n), "why": ""} | spent
            except ValueError as error:
                why = str(error)
        return {"reply": None, "why": why} | spent

    def of(self, feature: int):
        """`describe(panels)`, `judge(image, name)` and `locate(panel, name)` of one feature.

        The first gives a dict of 'patterns' and 'name', '' if the model gave none; the others a
        number in [0, 1], NaN if it gave none.
        """

        def describe(panels) -> dict:
            found = self.ask(feature, "describe", panels, n=len(panels))
            return found or {"patterns": "", "name": ""}

        def score(kind: str, image, name: str) -> float:
            found = self.ask(feature, kind, np.asarray(image)[None], name=name)
            return float("nan") if found is None else found["score"] / 100

        return (
            describe,
            lambda image, name: score("judge", image, name),
            lambda panel, name: score("locate", panel, name),
        )

    def write(self, feature: int, name: str, n: int, style: str = "") -> dict | None:
        """Prompts that should fire a feature of this name, and that should not, n of each.

        A dict of 'should' and 'should_not'; `style`, a sentence, says what prompts look like that
        the model was trained on.
        """
        style = f" {style}" if style else ""
        return self.ask(feature, "write", n=n, name=name, style=style)


def _pixels(picture) -> bytes:
    return repr(picture.size).encode() + picture.tobytes()


@dataclass(frozen=True)
class Bill:
    """Calls and tokens, and what they cost at prices for a million tokens read and written."""

    calls: int
    tokens: tuple[int, int]
    prices: tuple[float, float] = (0.0, 0.0)

    def __add__(self, other: "Bill") -> "Bill":
        tokens = tuple(a + b for a, b in zip(self.tokens, other.tokens))
        return Bill(self.calls + other.calls, tokens, self.prices)

    cost = property(lambda self: sum(t * p / 1e6 for t, p in zip(self.tokens, self.prices)))

    def __str__(self) -> str:
        read, written = self.tokens
        words = f"{self.calls:,} calls, {read:,} tokens read and {written:,} written"
        return words + (f", {self.cost:,.2f} at these prices" if any(self.prices) else "")


def expected(
    n_features: int, n_judged=30, n_localised=10, *, n_described=10, image_tokens=800, prices=(0, 0)
) -> Bill:
    """The bill beforehand: features × (1 + judged images), maps right and moved counting as two.

    `image_tokens`, what the model reads an image or panel as, differs from model to model; texts
    are taken as 4 characters a token. Replies that have to be asked for again come on top.
    """
    words = {kind: len(prompt(kind, n=10, name="x" * 40, style="")) // 4 for kind in FORMS}
    judged = n_judged + 2 * n_localised
    read = words["describe"] + n_described * image_tokens + judged * image_tokens
    read += n_judged * words["judge"] + 2 * n_localised * words["locate"]
    written = 100 + 10 * judged
    tokens = n_features * read, n_features * written
    return Bill(n_features * (1 + judged), tokens, tuple(prices))


def spent(folder: str | Path, prices=(0, 0)) -> Bill:
    """The bill of all replies in a folder, as the server counted."""
    records = [load_json(path) for path in sorted(Path(folder).glob("*/*.json"))]
    tokens = np.array([r["tokens"] for r in records], int).reshape(-1, 2).sum(0)
    return Bill(sum(r["calls"] for r in records), tuple(tokens.tolist()), tuple(prices))


def unanswered(folder: str | Path) -> dict[str, str]:
    """Files of questions that got no reply, by their path in the folder, and why."""
    found = {}
    for path in sorted(Path(folder).glob("*/*.json")):
        record = load_json(path)
        if record["reply"] is None:
            found[str(path.relative_to(folder))] = record["why"]
    return found
