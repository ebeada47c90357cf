import gzip
import json
import math
import sys
import warnings

import pytest

from cabochon.core.errors import DataError, MissingExtra
from cabochon.data.chat import Message
from cabochon.data.readers import read_chats, read_documents, read_records


def texts(path, **options):
    return [each.text for each in read_documents(path, **options)]


# -- JSON -----------------------------------------------------------------------------------------


def test_json_lines_are_read_with_file_and_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"text": "one\\u2028two"}\r\n\n{"text": "\xc3\xa9\xe2\x80\xa8x"}'
    )
    found = list(read_documents(file))
    assert [each.text for each in found] == ["one\u2028two", "é\u2028x"]
    assert [each.source for each in found] == [f"{file}:1", f"{file}:3"]


def test_compressed_lines_and_lists_are_the_same_rows(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "d.json").write_text(lines)
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    for file in tmp_path.iterdir():
        assert texts(file) == ["a", "b"], file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"rows\.jsonl:2: not JSON"),
        (b'{"text": "a"}\nplain text\n', r"rows\.jsonl:2: not JSON .*'plain text'"),
        (b'{"text": "a"}\n["a"]\n', r"rows\.jsonl:2: a JSON list, expected an object"),
        (b'\n\n{"txt": "a", "id": 1}\n', r"rows\.jsonl:3: no field 'text'; it has 'txt', 'id'"),
        (b'{"text": "a"}\n{}\n', r"rows\.jsonl:2: no field 'text'; it has no fields"),
        (b'{"text": null}\n', r"rows\.jsonl:1: the field 'text' is null, expected a string"),
        (b'{"text": 3}\n', r"rows\.jsonl:1: the field 'text' is a number, expected a string"),
        (b'{"text": ["a"]}\n', r"rows\.jsonl:1: the field 'text' is a list, expected a string"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"rows\.jsonl:2: byte 24 of the file is not UTF-8"),
        (b'{"text": "a\\ud800"}\n', r"rows\.jsonl:1: not valid Unicode: a lone surrogate U\+D800"),
        (b"", r"rows\.jsonl is empty"),
        (b"\n\n", r"rows\.jsonl is empty"),
        (b"[" * 100_000, r"rows\.jsonl:1: not JSON"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_reason(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(file)


def test_what_comes_before_a_bad_line_is_still_given_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n{')
    documents = read_documents(file)
    assert [next(documents).text, next(documents).text] == ["a", "b"]
    with pytest.raises(DataError, match=r"rows\.jsonl:3"):
        next(documents)


def test_another_field_can_be_the_text(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"code": "x"}\n')
    assert texts(file, field="code") == ["x"]


@pytest.mark.parametrize("cut", [5, 20, -9, -1])
def test_a_damaged_archive_is_named(tmp_path, cut):
    whole = gzip.compress(b'{"text": "some words"}\n' * 50)
    for name in ("rows.jsonl.gz", "words.txt.gz"):
        file = tmp_path / name
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"{name}.*(damaged|cannot be read)"):
            texts(file)
        file.write_bytes(b"not compressed at all")
        with pytest.raises(DataError, match=name):
            texts(file)


# -- text and folders -----------------------------------------------------------------------------


def test_a_text_file_is_one_document_kept_as_it_is(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_bytes("é\r\n\tlast line \n\n".encode())
    assert texts(file) == ["é\r\n\tlast line \n\n"]


def test_text_that_is_not_utf8_is_refused_with_the_byte(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: byte 3 is not UTF-8"):
        texts(file)


def test_a_folder_is_its_text_files_by_name(tmp_path):
    for name in ("b.py", "a/z.md", "a/y.txt", "c.rst", ".hidden/x.txt", "data.bin", "empty.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.py" else name)
    assert texts(tmp_path) == ["a/y.txt", "a/z.md", "b.py", "c.rst"]


def test_a_folder_of_records_is_all_its_files(tmp_path):
    (tmp_path / "2.jsonl").write_text('{"text": "c"}\n')
    (tmp_path / "1.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert texts(tmp_path) == ["a", "b", "c"]


def test_a_folder_of_text_and_records_must_be_told_apart(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"holds text \(README\.md\) and records \(rows\.jsonl\)"):
        texts(tmp_path)


@pytest.mark.parametrize("read", [read_documents, read_records, read_chats])
def test_paths_without_data_are_refused(tmp_path, read):
    with pytest.raises(DataError, match="does not exist"):
        list(read(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match="it holds nothing"):
        list(read(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"it holds \.bin"):
        list(read(tmp_path))
    with pytest.raises(DataError, match=r"of the kind \.bin; known are \.jsonl"):
        list(read(tmp_path / "model.bin"))


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(DataError, match="is empty"):
            texts(path)


# -- parquet and datasets -------------------------------------------------------------------------


def test_parquet_rows_are_read_with_their_number(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b", None], "id": [1, 2, 3]}), file)
    documents = read_documents(file)
    assert [next(documents).text, next(documents).text] == ["a", "b"]
    with pytest.raises(DataError, match=r"rows\.parquet, row 3: the field 'text' is null"):
        next(documents)
    with pytest.raises(DataError, match=r"row 1: no field 'body'; it has 'text', 'id'"):
        texts(file, field="body")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read as parquet"):
        texts(file)


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'cabochon\[hf\]'"):
        texts(tmp_path / "rows.parquet")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "id": [1, 2]})
    rows.save_to_disk(folder / "one")
    rows.select([1]).save_to_disk(folder / "chosen")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "several")
    turns = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]]
    datasets.Dataset.from_dict({"messages": turns}).save_to_disk(folder / "chats")
    return folder


def test_a_saved_data_set_is_read(saved):
    assert texts(saved / "one") == ["a", "b"]
    assert texts(saved / "chosen") == ["b"]
    assert texts(saved / "several" / "train") == ["a", "b"]
    (chat,) = read_chats(saved / "chats")
    assert chat.messages == (Message("user", "hi"), Message("assistant", "yes"))


def test_a_data_set_of_several_splits_must_be_told_which(saved):
    with pytest.raises(DataError, match=r"holds the splits test, train; name one, such as .*test"):
        texts(saved / "several")


def test_a_data_set_without_its_package_says_what_to_install(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'cabochon\[hf\]'"):
        texts(saved / "one")


# -- chats ----------------------------------------------------------------------------------------


def chats(tmp_path, *rows, **options):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_chats(file, **options))


def test_messages_and_prompts_are_both_conversations(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found = chats(
        tmp_path,
        {"messages": turns, "id": 3},
        {"prompt": "q", "completion": "a"},
        {"prompt": turns[:1], "completion": turns[1:]},
    )
    assert [[each.content for each in chat.messages] for chat in found] == [["q", "a"]] * 3
    assert [chat.messages[1].role for chat in found] == ["assistant", "model", "assistant"]
    assert found[2].source.endswith("chats.jsonl:3")
    named = chats(
        tmp_path, {"question": "q", "answer": "a"}, prompt="question", completion="answer"
    )
    assert named[0].messages == (Message("user", "q"), Message("model", "a"))
    (sums,) = chats(tmp_path, {"question": "3 + 4.5", "answer": 7.5})
    assert sums.messages[1] == Message("model", "7.5")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "the field 'messages', or 'prompt' and 'completion'; it has 'text'"),
        ({"prompt": "a"}, "it has 'prompt'"),
        ({"messages": "a"}, "the field 'messages' is a string, expected messages"),
        ({"messages": []}, "the field 'messages' is an empty list, expected messages"),
        ({"messages": ["a"]}, "message 0 is a string, expected an object"),
        ({"messages": [{"from": "user"}]}, "message 0 has no string 'role'; it has 'from'"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0 has no string 'content'"),
        ({"prompt": "q", "completion": True}, "the field 'completion' is a truth value, expected"),
        ({"prompt": "q", "completion": math.nan}, "the field 'completion' is a number, expected"),
        ({"prompt": "\ud800", "completion": "a"}, "lone surrogate"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_conversation_is_named_with_its_reason(tmp_path, row, message):
    fine = {"prompt": "q", "completion": "a"}
    with pytest.raises(DataError, match=r"chats\.jsonl:2: .*" + message):
        chats(tmp_path, fine, row)


# -- public data ----------------------------------------------------------------------------------


def test_public_sets_are_read_whole(shared_data):
    assert len(texts(shared_data / "tinyshakespeare" / "input.txt.gz")[0]) == 1_115_394
    questions = texts(shared_data / "gsm8k" / "train.jsonl.gz", field="question")
    assert len(questions) == 7473
    assert sum(1 for _ in read_chats(shared_data / "t0_mix" / "t0_mix.jsonl.gz")) == 11753
    with pytest.raises(
        DataError, match=r"seed_tasks\.jsonl\.gz:1: no field 'text'; it has 'id', 'name', 'inst"
    ):
        texts(shared_data / "self_instruct" / "seed_tasks.jsonl.gz")
    with pytest.raises(DataError, match=r"dialogs\.jsonl\.gz:1: expected the field 'messages'"):
        list(read_chats(shared_data / "tm4_dialogs" / "dialogs.jsonl.gz"))
