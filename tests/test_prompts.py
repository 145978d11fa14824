import json

import datasets
import pytest

from helpers.run.prompts import read_prompts

PROMPTS = ["a dog", 'a cät, "two" cats', "7", "three\tbirds"]
TABLES = {
    "p.txt": 'a dog\n\n  a cät, "two" cats \n   \n7\nthree\tbirds\n',
    "p": 'a dog\na cät, "two" cats\n7\nthree\tbirds',
    "p.csv": 'n,prompt\n1,a dog\n2,\n3,"a cät, ""two"" cats"\n4,   \n5,7\n6,three\tbirds\n',
    "p.tsv": 'n\tprompt\n1\ta dog\n2\t\n3\t"a cät, ""two"" cats"\n4\t  \n5\t7\n6\t"three\tbirds"\n',
    "p.jsonl": "".join(
        json.dumps({"n": i, "prompt": p}) + "\n"
        for i, p in enumerate([*PROMPTS[:2], None, " ", *PROMPTS[2:]])
    ),
    "p.json": json.dumps(
        [{"n": i, "prompt": p} for i, p in enumerate([*PROMPTS[:2], None, "", *PROMPTS[2:]])]
    ),
    "p.parquet": [*PROMPTS[:2], None, "  ", *PROMPTS[2:]],
}
WITH_COLUMNS = ["p.csv", "p.tsv", "p.jsonl", "p.json", "p.parquet"]


@pytest.fixture(autouse=True)
def unreported(monkeypatch):
    monkeypatch.setattr(
        datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False
    )  # else even local files are told to the hub


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Writes one of the tables and gives its path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, column="prompt"):
        path = tmp_path / name
        if name == "p.parquet":
            datasets.Dataset.from_dict({"n": list(range(6)), column: TABLES[name]}).to_parquet(path)
        else:
            path.write_text(TABLES[name].replace("prompt", column), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", TABLES)
def test_prompts_are_the_rows_that_hold_something(source, name):
    path = source(name)
    assert read_prompts(path) == PROMPTS
    assert read_prompts(str(path), 2) == PROMPTS[:2]
    assert read_prompts(path, 99) == PROMPTS


@pytest.mark.parametrize("name", WITH_COLUMNS)
def test_prompts_come_from_the_named_column(source, name):
    path = source(name, "caption")
    assert read_prompts(path, 3, "caption") == PROMPTS[:3]
    with pytest.raises(ValueError, match=f"prompt_column is 'prompt'.*{name}: n, caption"):
        read_prompts(path)


def test_numbers_are_prompts_too(source):
    assert read_prompts(source("p.csv"), 3, "n") == ["1", "2", "3"]  # DiT's classes


@pytest.mark.parametrize(
    "name, content",
    [
        ("e.txt", "\n \n"),
        ("e.csv", "prompt\n"),
        ("e.csv", 'prompt\n" "\n'),
        ("e.jsonl", '{"prompt": ""}\n'),
    ],
)
def test_a_file_without_prompts_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    "name, content",
    [("bad.parquet", b"no parquet"), ("bad.json", b'{"prompt": '), ("empty.csv", b"")],
)
def test_a_table_that_cannot_be_read_is_named_in_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"prompts is '.*{name}'") as refused:
        read_prompts(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_text_that_is_none_is_named(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a dog\n\xff\xfe\x00\n")
    with pytest.raises(ValueError, match="prompts is '.*p.txt'.*UTF-8.*byte 6"):
        read_prompts(tmp_path / "p.txt")


def test_a_texts_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("a cät\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "p.txt") == ["a cät"]


@pytest.mark.parametrize("absent", ["absent.txt", "folder/absent.csv", "scene"])
def test_a_prompt_file_that_is_missing_is_named(absent):
    with pytest.raises(FileNotFoundError, match=f"prompts '{absent}'.*'scenes'"):
        read_prompts(absent)


def test_a_dataset_that_the_network_does_not_give_is_named_in_one_sentence(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\n(a long story)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="prompts is 'owner/name'.*Couldn't reach") as refused:
        read_prompts("owner/name")
    assert "\n" not in str(refused.value)


def test_a_dataset_on_the_hub_is_streamed(monkeypatch):
    asked, drawn = [], []

    def prompts_without_end():
        for i in range(10_000):
            drawn.append(i)
            yield {"caption": None if i % 2 else f"prompt {i}", "other": i}

    def load_dataset(path, *, split, streaming):
        asked.append((path, split, streaming))
        return datasets.IterableDataset.from_generator(prompts_without_end)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_prompts("owner/some-name", 3, "caption") == ["prompt 0", "prompt 2", "prompt 4"]
    assert asked == [("owner/some-name", "train", True)]
    assert len(drawn) < 20 and drawn == sorted(set(drawn))  # no row is fetched twice
    with pytest.raises(ValueError, match="prompt_column is 'prompt'.*caption, other"):
        read_prompts("owner/some-name", 3)


def test_of_parquet_no_other_column_is_fetched(source, monkeypatch):
    path, asked, load = source("p.parquet", "caption"), [], datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: asked.append(k.get("columns")) or load(*a, **k)
    )
    assert read_prompts(path, 3, "caption") == PROMPTS[:3] and asked == [None, ["caption"]]
