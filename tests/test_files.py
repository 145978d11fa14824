import hashlib
import json
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import files

TENSORS = {
    "whole": torch.arange(6).view(2, 3),
    "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([1.5], dtype=torch.bfloat16),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "turned": torch.arange(6.0).view(2, 3).T,
    "scalar": torch.tensor(3.25),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8]
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def leftovers(folder):
    return [p.name for p in folder.rglob("*") if "part" in p.name]


def test_tensors_and_record_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "folder" / "a.safetensors"
    files.save_tensors(path, TENSORS, {"k": [1, {"é": None}]})
    tensors, record = files.load_tensors(path)
    assert record == {"k": [1, {"é": None}]}
    assert tensors.keys() == TENSORS.keys()
    for name, t in TENSORS.items():
        assert tensors[name].dtype == t.dtype and torch.equal(tensors[name], t)
    assert leftovers(tmp_path) == []


def test_only_the_named_tensors_are_read(tmp_path):
    files.save_tensors(tmp_path / "a", TENSORS, {"k": 1})
    tensors, record = files.load_tensors(tmp_path / "a", ("half", "bytes"))
    assert (
        tensors.keys() == {"half", "bytes"}
        and torch.equal(tensors["bytes"], TENSORS["bytes"])
        and record == {"k": 1}
    )
    assert files.load_tensors(tmp_path / "a", ()) == ({}, {"k": 1})
    with pytest.raises(ValueError, match="a is damaged.*absent"):
        files.load_tensors(tmp_path / "a", ("absent",))


@given(
    rows=st.lists(st.integers(0, 6)),
    shape=st.sampled_from([(7,), (7, 3), (7, 2, 5)]),
    dtype=st.sampled_from(DTYPES),
)
def test_some_rows_of_one_tensor(tmp_path_factory, rows, shape, dtype):
    path, x = tmp_path_factory.getbasetemp() / "rows", torch.randn(shape).to(dtype)
    files.save_tensors(path, {"x": x, "other": torch.zeros(3)})
    found = files.load_rows(path, "x", rows)
    assert len(found) == len(rows)
    for row, t in zip(rows, found):
        assert t.dtype == dtype and torch.equal(t, x[row])


@given(content=st.binary(max_size=200))
def test_a_digest_is_the_sha256_of_the_bytes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    assert files.digest(path) == hashlib.sha256(content).hexdigest()


@given(record=json_values)
def test_any_json_record_comes_back(tmp_path_factory, record):
    path = tmp_path_factory.getbasetemp() / "record.json"
    files.save_json(path, record)
    assert files.load_json(path) == record


def test_the_same_contents_give_the_same_bytes(tmp_path):
    for name, record in (("a", {"x": 1, "y": 2}), ("b", {"y": 2, "x": 1})):
        files.save_tensors(tmp_path / f"{name}.safetensors", TENSORS, record)
        files.save_json(tmp_path / f"{name}.json", record)
    for suffix in ("safetensors", "json"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_several_things_told_of_a_file_still_give_the_same_bytes(tmp_path):
    for i in range(8):  # metadata of several keys come in any order
        files.save_tensors(tmp_path / str(i), TENSORS, {"a": 1, "b": {"c": 2}})
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    path = tmp_path / "a.safetensors"
    files.save_tensors(path, TENSORS, {"k": 4})
    whole, noticed = path.read_bytes(), 0
    start = 8 + int.from_bytes(whole[:8], "little")  # where the tensors' bytes begin
    for at in range(len(whole)):
        flip(path, at)
        try:
            tensors, _ = files.load_tensors(path)
        except ValueError as error:
            assert "a.safetensors is damaged" in str(error)
            noticed += 1
        else:  # only where it says that there is a digest
            assert (
                at < start
                and tensors.keys() == TENSORS.keys()
                and all(torch.equal(t, TENSORS[name]) for name, t in tensors.items())
            )
        path.write_bytes(whole)
    assert noticed >= len(whole) - 40


def test_a_digest_is_that_of_what_is_read(tmp_path):
    """Some tensors are read without the rest; a file made elsewhere keeps no digest."""
    path = tmp_path / "a.safetensors"
    files.save_tensors(path, {"x": torch.ones(2), "y": torch.ones(2)})
    assert files.load_tensors(path)[1] == {}
    flip(path, -1)
    assert torch.equal(files.load_tensors(path, ("x",))[0]["x"], torch.ones(2))
    for metadata in (None, {"format": "pt"}, {"record": '{"k": 1}'}):
        files.save_file({"x": torch.ones(2)}, path, metadata)
        assert torch.equal(files.load_tensors(path)[0]["x"], torch.ones(2))


def test_files_can_be_read_by_others(tmp_path):
    files.save_tensors(tmp_path / "a.safetensors", TENSORS)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) & 0o444 == 0o444


def fill_up(tensors, path, metadata=None):
    path.write_bytes(b"half a fi")
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_old_tensors_and_nothing_beside_them(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    files.save_tensors(path, {"x": torch.ones(2)})
    before = path.read_bytes()
    monkeypatch.setattr(files, "save_file", fill_up)
    with pytest.raises(OSError, match="a.safetensors could not be written.*No space left"):
        files.save_tensors(path, {"x": torch.zeros(2)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_full_disk_leaves_nothing_where_nothing_was(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "save_file", fill_up)
    with pytest.raises(OSError, match="a.safetensors"):
        files.save_tensors(tmp_path / "a.safetensors", TENSORS)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_to_clean_up_does_not_hide_why_it_failed(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.Path, "unlink", read_only)
    monkeypatch.setattr(files, "save_file", fill_up)
    with pytest.raises(OSError, match="a.safetensors could not be written.*No space left"):
        files.save_tensors(tmp_path / "a.safetensors", TENSORS)
    monkeypatch.setattr(files.Path, "mkdir", read_only)
    with pytest.raises(OSError, match="a.json could not be written.*Read-only"):
        files.save_json(tmp_path / "new" / "a.json", {})


def test_where_nothing_may_be_written_no_disk_space_is_asked_for(tmp_path, monkeypatch):
    files.check_writable(tmp_path / "new" / "folder", "a.json")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13)))
    monkeypatch.setattr(files.os, "access", lambda path, _: path == tmp_path)
    files.check_writable(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(OSError, match="a.json could not be written .*; make it and .* writable$"):
        files.save_json(tmp_path / "a.json", {})
    with pytest.raises(OSError, match=f"^run: {tmp_path} cannot .*a.json is read-only$"):
        files.check_writable(tmp_path, "a.json")


def test_a_folder_where_a_file_should_be_is_named(tmp_path):
    (tmp_path / "a.file").mkdir()
    for refused in (
        files.load_tensors,
        files.load_json,
        lambda path: files.load_rows(path, "x", [0]),
        lambda path: files.save_json(path, {}),
    ):
        with pytest.raises((ValueError, OSError), match="a.file is a folder; "):
            refused(tmp_path / "a.file")
    assert [p.name for p in tmp_path.iterdir()] == ["a.file"]


@pytest.mark.parametrize(
    "value, said",
    [
        (0, "0 B"),
        (900, "900 B"),
        (1500, "1.50 kB"),
        (2_340_000, "2.34 MB"),
        (41e9, "41.00 GB"),
        (2.5e12, "2.50 TB"),
    ],
)
def test_sizes_have_a_unit_that_suits_them(value, said):
    assert files.in_units(value) == said


def test_a_reader_of_the_old_file_never_sees_half_of_the_new_one(tmp_path):
    files.save_json(tmp_path / "a.json", {"x": 1})
    with open(tmp_path / "a.json") as reader:
        files.save_json(tmp_path / "a.json", {"y": [0] * 1000})
        assert json.load(reader) == {"x": 1}


def test_writers_of_the_same_file_do_not_disturb_one_another(tmp_path):
    def write(i):
        for _ in range(20):
            files.save_json(tmp_path / "a.json", [i] * 100)
            assert len(set(files.load_json(tmp_path / "a.json"))) == 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_interrupt_while_writing_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    files.save_tensors(path, {"x": torch.ones(2)})
    before = path.read_bytes()

    def interrupted(tensors, aside, metadata):
        aside.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.save_tensors(path, TENSORS)
    assert path.read_bytes() == before and leftovers(tmp_path) == []


def test_a_record_that_is_no_json_leaves_the_old_file_alone(tmp_path):
    files.save_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        files.save_json(tmp_path / "a.json", {"x": np.zeros(2)})
    assert files.load_json(tmp_path / "a.json") == {"x": 1} and leftovers(tmp_path) == []


LOADS = pytest.mark.parametrize(
    "load", [files.load_tensors, files.load_json, lambda path: files.load_rows(path, "whole", [0])]
)


@LOADS
def test_a_missing_file_is_named(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="absent.file"):
        load(tmp_path / "absent.file")


@LOADS
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'{"a": ', bytes(200)])
def test_a_damaged_file_is_named(tmp_path, load, content):
    (tmp_path / "bad.file").write_bytes(content)
    with pytest.raises(ValueError, match="bad.file is damaged"):
        load(tmp_path / "bad.file")


@given(share=st.floats(0, 0.999))
def test_tensors_cut_short_anywhere_are_refused(tmp_path_factory, share):
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    files.save_tensors(path, TENSORS, {"k": 1})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="cut.safetensors is damaged"):
        files.load_tensors(path)
    with pytest.raises(ValueError, match="cut.safetensors is damaged"):
        files.load_rows(path, "whole", [0])


def test_json_is_plain_text_with_sorted_keys_or_as_given(tmp_path):
    files.save_json(tmp_path / "a.json", {"b": 1, "a": 2})
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n") and list(json.loads(text)) == ["a", "b"]
    files.save_json(tmp_path / "a.json", {"b": 1, "a": 2}, sort_keys=False)
    assert list(files.load_json(tmp_path / "a.json")) == ["b", "a"]


def test_what_is_not_a_number_is_null_in_json(tmp_path):
    path, nan = tmp_path / "a.json", float("nan")
    files.save_json(path, {"x": nan, "y": [(1.5, nan), {"z": float("inf"), "n": np.float64(nan)}]})
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    assert files.load_json(path) == {"x": None, "y": [[1.5, None], {"z": None, "n": None}]}
