import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from servers import chat, serving

from helpers.naming import replies
from helpers.naming.backends import Answer, Server
from helpers.naming.replies import Replies

IMAGES = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
GOOD = {"patterns": "red things", "name": "red circle"}


class Says:
    """A backend that gives answers in turn, and counts how often it was asked."""

    def __init__(self, *answers, model="stand-in"):
        self.answers, self.model, self.asked = list(answers), model, []

    def ask(self, prompt, images, schema, attempt=0):
        self.asked.append((prompt, len(images), schema, attempt))
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        return answer if isinstance(answer, Answer) else Answer(json.dumps(answer), (10, 2))


def test_the_three_callables_ask_with_their_prompts_and_give_plain_values(tmp_path):
    backend = Says(GOOD, {"score": 80}, {"score": 5})
    describe, judge, locate = Replies(backend, tmp_path).of(7)
    assert describe(IMAGES) == GOOD
    assert judge(IMAGES[0], "red circle") == 0.8 and locate(IMAGES[1], "red circle") == 0.05
    (described, n, form, _), (judged, *_), (located, *_) = backend.asked
    assert "4 pictures" in described and n == 4 and set(form["required"]) == {"patterns", "name"}
    assert "red circle" in judged and "lit region" in located and "lit region" not in judged


def test_each_question_is_asked_once_and_every_part_of_it_counts(tmp_path):
    backend = Says({"score": 50})

    def judge(feature=1, image=IMAGES[0], name="cat", by=backend):
        return Replies(by, tmp_path).of(feature)[1](image, name)

    judge()
    judge()
    assert len(backend.asked) == 1 and len(list(tmp_path.glob("1/judge-*.json"))) == 1
    for other in ({"feature": 2}, {"image": IMAGES[1]}, {"name": "dog"}):
        judge(**other)
    assert len(backend.asked) == 4
    another = Says({"score": 10}, model="another")
    assert judge(by=another) == 0.1 and judge() == 0.5


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 40}',
        '```json\n{"score": 40}\n```',
        'I think {not json} that {"score": 10} is low, so {"score": 40} it is.',
    ],
)
def test_json_is_found_in_fences_and_after_words(tmp_path, text):
    assert Replies(Says(Answer(text)), tmp_path).of(0)[1](IMAGES[0], "x") == 0.4


@pytest.mark.parametrize(
    "kind, bad",
    [
        ("judge", {"score": 101}),
        ("judge", {"score": "80"}),
        ("judge", {"score": True}),
        ("judge", {"rating": 3}),
        ("judge", {"score": float("nan")}),
        ("describe", {"patterns": "p", "name": " "}),
        ("describe", {"patterns": ["p"], "name": "n"}),
        ("describe", {"patterns": "p", "name": "n" * 201}),
        ("write", {"should": ["a"], "should_not": ["b", "c"]}),
        ("write", {"should": ["a", ""], "should_not": ["b", "c"]}),
    ],
)
def test_replies_that_do_not_fit_are_refused_and_say_why(kind, bad):
    with pytest.raises(ValueError, match="^(score|name|patterns|should) "):
        replies.checked(kind, bad, n=2)


def test_a_reply_that_does_not_fit_is_asked_for_again_and_all_tokens_count(tmp_path):
    backend = Says(Answer("no idea", (5, 1)), Answer('{"score": 400}', (5, 1)), {"score": 40})
    assert Replies(backend, tmp_path).of(0)[1](IMAGES[0], "x") == 0.4
    assert [attempt for *_, attempt in backend.asked] == [0, 1, 2]
    assert replies.spent(tmp_path, (1.0, 10.0)) == replies.Bill(3, (20, 4), (1.0, 10.0))


@pytest.mark.parametrize(
    "answer, calls, why",
    [
        (Answer("nothing"), 3, "no JSON object in 'nothing'"),
        (Answer("", (1, 1), "no"), 1, "refused: no"),
    ],
)
def test_what_is_not_answered_is_kept_as_that_and_not_asked_again(tmp_path, answer, calls, why):
    backend = Says(answer)
    for _ in range(2):
        describe, judge, _ = Replies(backend, tmp_path).of(0)
        assert np.isnan(judge(IMAGES[0], "x")) and describe(IMAGES)["name"] == ""
    assert len(backend.asked) == 2 * calls
    assert set(replies.unanswered(tmp_path).values()) == {why}
    assert all(name.startswith("0/") for name in replies.unanswered(tmp_path))


def test_prompts_for_the_examiner_are_as_many_as_asked_for(tmp_path):
    given = {"should": ["a", "b", "c"], "should_not": [" d  e", "f"]}
    backend = Says(given)
    found = Replies(backend, tmp_path).write(3, "red circle", 2, "Captions are short.")
    assert found == {"should": ["a", "b"], "should_not": ["d e", "f"]}
    ((prompt, n_images, *_),) = backend.asked
    assert n_images == 0 and "2 short prompts" in prompt and "Captions are short." in prompt
    assert Replies(backend, tmp_path).write(3, "red circle", 2, "Captions are short.") == found


def test_the_bill_beforehand_is_features_times_one_and_the_judged_images():
    bill = replies.expected(10, 30, 10, n_described=10, image_tokens=100, prices=(1.0, 2.0))
    assert bill.calls == 10 * (1 + 30 + 2 * 10)
    assert bill.tokens[0] > 10 * 100 * (10 + 30 + 20) and bill.cost == pytest.approx(
        bill.tokens[0] / 1e6 + 2 * bill.tokens[1] / 1e6
    )
    assert "510 calls" in str(bill) and "at these prices" in str(bill)
    assert "prices" not in str(replies.expected(1))


def test_a_folder_without_replies_costs_nothing(tmp_path):
    assert replies.spent(tmp_path) == replies.Bill(0, (0, 0), (0, 0))


def test_no_key_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("A_SERVERS_KEY", "secret-17")
    with serving(chat({"score": 20})) as server:
        backend = Server("m", server.url, "A_SERVERS_KEY")
        Replies(backend, tmp_path).of(0)[1](IMAGES[0], "x")
    (path,) = tmp_path.rglob("*.json")
    assert "secret-17" not in path.read_text() and server.url not in path.read_text()


def test_a_server_that_is_down_stops_the_run_and_writes_nothing(tmp_path):
    with serving((503, {}, "")) as server, pytest.raises(ConnectionError):
        Replies(Server("m", server.url, retries=0), tmp_path).of(0)[1](IMAGES[0], "x")
    assert not list(tmp_path.rglob("*.json"))


def judged(url, folder):
    """Judge four images, one after another."""
    backend = Server("m", url, timeout=30.0, wait=0.01)
    judge = Replies(backend, folder).of(0)[1]
    return [judge(image, "x") for image in IMAGES]


@pytest.mark.process
def test_a_killed_run_asks_only_for_what_is_missing(tmp_path):
    first = [chat({"score": 10}), (429, {}, ""), chat({"score": 20}), "hang"]
    with serving(*first) as server:
        run = multiprocessing.get_context("fork").Process(
            target=judged, args=(server.url, tmp_path)
        )
        run.start()
        waited = time.monotonic() + 60
        while len(server.asked) < 4 and time.monotonic() < waited:
            time.sleep(0.02)
        os.kill(run.pid, signal.SIGKILL)
        run.join()
    assert run.exitcode == -signal.SIGKILL and len(list(tmp_path.rglob("*.json"))) == 2
    with serving(chat({"score": 30})) as server:
        assert judged(server.url, tmp_path) == [0.1, 0.2, 0.3, 0.3]
    assert len(server.asked) == 2
