import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from servers import chat, serving

from helpers.naming import backends
from helpers.naming.backends import Local, Server

IMAGES = np.random.default_rng(0).random((2, 16, 24, 3), np.float32)
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}


def ask(server, *, images=IMAGES, attempt=0, **options):
    patient = {"timeout": 20.0, "wait": 0.01, "retries": 3} | options
    return Server("tiny-vlm", server.url, **patient).ask("What is it?", images, SCHEMA, attempt)


def test_what_is_sent_is_openais_form_with_images_and_the_schema():
    with serving(chat({"score": 3}, usage=(70, 5))) as server:
        answer = ask(server)
    ((path, _, body),) = server.asked
    assert path == "/v1/chat/completions" and body["model"] == "tiny-vlm"
    form = body["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["schema"] == SCHEMA
    *seen, said = body["messages"][0]["content"]
    assert said == {"type": "text", "text": "What is it?"} and len(seen) == 2
    head, data = seen[1]["image_url"]["url"].split(",")
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert head == "data:image/png;base64" and sent.shape == (224, 336, 3)  # 14 times
    assert np.array_equal(sent[::14, ::14], (IMAGES[1] * 255).round().astype(np.uint8))
    assert (json.loads(answer.text), answer.tokens, answer.refused) == ({"score": 3}, (70, 5), "")


def test_options_are_added_and_taken_away_and_a_second_attempt_is_another_one():
    with serving(chat("{}")) as server:
        ask(server, options={"seed": None, "top_p": 0.5})
        ask(server, attempt=1)
    first, second = server.bodies
    assert first["top_p"] == 0.5 and "seed" not in first and first["temperature"] == 0
    assert second["seed"] == 1 and second["temperature"] > 0


def test_the_key_comes_from_the_environment_and_no_other_one_goes_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_reader")
    monkeypatch.setenv("A_SERVERS_KEY", "secret-17")
    with serving(chat("{}")) as server:
        ask(server)
        ask(server, key="A_SERVERS_KEY")
    without, with_key = ({k.lower(): v for k, v in h.items()} for _, h, _ in server.asked)
    assert "authorization" not in without and "hf_of_the_reader" not in str(without)
    assert with_key["authorization"] == "Bearer secret-17"


def test_a_key_that_is_not_there_is_refused_without_repeating_what_was_given():
    with pytest.raises(ValueError, match="key must be the name of an environment") as refused:
        Server("m", "http://localhost/v1", "sk-oops-this-is-the-key")
    assert "oops" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "http://host/v1?api_key=secret"])
def test_an_address_that_holds_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(ValueError, match="password or a query") as refused:
        Server("m", url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/v1"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="base_url is .*an address such as"):
        Server("m", url)


def test_a_model_has_to_be_named():
    with pytest.raises(ValueError, match="model is ''"):
        Server("", "http://localhost/v1")


BUSY = (429, {"Retry-After": "0.01"}, {"error": "slow down"})


@pytest.mark.parametrize(
    "passing",
    [
        [BUSY, BUSY],
        [(500, {}, "oh"), (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "")],
        [(200, {}, "{'no json"), (200, {}, {"error": {"message": "overloaded"}})],
        [(200, {}, "[]"), {"choices": []}],
    ],
)
def test_what_may_pass_is_asked_again(passing):
    with serving(*passing, chat("done")) as server:
        assert ask(server).text == "done"
    assert len(server.asked) == 3 and server.bodies[0] == server.bodies[2]


def test_a_server_that_hangs_is_asked_again():
    with serving("hang", chat("done")) as server:
        assert ask(server, timeout=0.5, retries=9).text == "done"
    assert len(server.asked) >= 2


def test_waits_double_and_heed_what_the_server_asks_for_up_to_a_minute(monkeypatch):
    waited = []
    monkeypatch.setattr(backends.time, "sleep", waited.append)
    replies = [(503, {}, ""), (503, {}, ""), (429, {"Retry-After": "7"}, "")]
    with serving(*replies, (429, {"Retry-After": "3600"}, ""), chat("done")) as server:
        assert ask(server, wait=1.0, retries=4).text == "done"
    assert 0.5 <= waited[0] <= 1 <= waited[1] <= 2 and waited[2:] == [7, 60]


def test_a_server_that_never_answers_ends_in_one_sentence():
    with (
        serving((429, {}, {"error": "quota"})) as server,
        pytest.raises(ConnectionError) as refused,
    ):
        ask(server, retries=2)
    assert len(server.asked) == 3 and "\n" not in str(refused.value)
    assert "no answer 3 times (status 429" in str(refused.value)
    assert "quota" in str(refused.value) and "kept" in str(refused.value)


def test_what_will_not_pass_is_not_asked_again_and_says_no_key(monkeypatch):
    monkeypatch.setenv("A_SERVERS_KEY", "secret-17")
    echo = (401, {}, {"error": "wrong key secret-17"})
    with serving(echo) as server, pytest.raises(ConnectionError, match="status 401") as refused:
        ask(server, key="A_SERVERS_KEY")
    assert len(server.asked) == 1 and "secret" not in str(refused.value)


def test_nobody_at_the_address_is_said_so():
    with serving(chat("")) as server:
        gone = server.url
    with pytest.raises(ConnectionError, match="gave no answer 1 times"):
        Server("m", gone, retries=0).ask("?", IMAGES, SCHEMA)


@pytest.mark.parametrize(
    "reply, expected",
    [
        (chat(None, refusal="I cannot help"), "I cannot help"),
        (chat("", finish="content_filter"), "the server's filter kept the reply back"),
        (chat("text"), ""),
    ],
)
def test_a_refusal_is_told_from_a_reply(reply, expected):
    with serving(reply) as server:
        answer = ask(server)
    assert answer.refused == expected and bool(answer.text) == (not expected)


def test_a_reply_with_parts_missing_is_an_empty_one():
    with serving({"choices": [{"finish_reason": "stop"}], "usage": None}) as server:
        assert ask(server) == backends.Answer("", (0, 0), "")


@pytest.mark.parametrize(
    "shape, size",
    [((16, 16, 1), (224, 224)), ((512, 512, 3), (512, 512)), ((32, 2050, 3), (1024, 16))],
)
def test_pictures_are_neither_too_small_to_see_nor_larger_than_need_be(shape, size):
    (picture,) = backends.pictures(np.full((1, *shape), 0.5))
    assert picture.size == size and picture.getpixel((0, 0)) == (128, 128, 128)


class Pipe:
    """Takes what the pipeline of transformers takes, and says how it was asked."""

    def __init__(self, made):
        self.made, self.calls = made, []

    def __call__(self, text, return_full_text, generate_kwargs):
        self.calls.append((text, return_full_text, generate_kwargs))
        return [{"generated_text": self.made}]

    def tokenizer(self, text):
        return {"input_ids": text.split()}


def test_a_local_model_is_asked_as_a_pipeline_of_transformers_is():
    pipe = Pipe('{"score": 5}')
    answer = Local("mine", pipe, 50).ask("What is it?", IMAGES, SCHEMA)
    Local("mine", pipe).ask("What is it?", IMAGES, SCHEMA, attempt=2)
    assert answer.text == '{"score": 5}' and answer.tokens == (3, 2)
    (((message,), full, options), (_, _, later)) = pipe.calls
    assert message["role"] == "user" and full is False
    assert [part["type"] for part in message["content"]] == ["image", "image", "text"]
    assert message["content"][0]["image"].size == (336, 224)
    assert options == {"max_new_tokens": 50, "do_sample": False} and later["do_sample"]


def test_what_transformers_cannot_load_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="^model is .*answers about images") as refused:
        Local.load(str(tmp_path), "cpu")
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory):
    """A folder with a tiny LLaVA of random weights, from the real classes of transformers."""
    import torch
    import transformers as t
    from encoders import SMALL, SQUARE, VISION
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<pad>", "<s>", "</s>", "<image>", "What", "is", "it", "?", "score"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=words, additional_special_tokens=["<image>"], **special
    )
    pixels = t.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    options = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    processor = t.LlavaProcessor(
        pixels, tokenizer, chat_template=template, num_additional_image_tokens=1, **options
    )
    torch.manual_seed(0)
    text = t.LlamaConfig(vocab_size=10, pad_token_id=1, eos_token_id=3, **SMALL)
    parts = {"vision_config": t.CLIPVisionConfig(**VISION), "text_config": text}
    config = t.LlavaConfig(**parts, image_token_index=4, vision_feature_layer=-1)
    folder = tmp_path_factory.mktemp("vlm")
    t.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_a_real_model_of_random_weights_answers_the_same_each_time(tiny_vlm):
    local = Local.load(tiny_vlm, "cpu", max_new_tokens=6)
    said = [local.ask("What is it?", IMAGES, SCHEMA, attempt) for attempt in (0, 0, 1, 1)]
    assert said[0] == said[1] and said[2] == said[3]
    assert "What is it" not in said[0].text and said[0].tokens[0] == 4
