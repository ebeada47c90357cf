import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.core.errors import ConfigError, DataError, FolderError, TokenizerMismatch
from cabochon.data.bpe import CONTROLS
from cabochon.data.tokenizer import Tokenizer, train_tokenizer

AWKWARD = [
    "", " ", "  ", "\t", "\n", "\r\n", "\r", "\x00", "\x0b\x0c\x1c\x85\u2028\u2029\xa0\u3000",
    "a  b   c\n\n\n\td \n", "   leading", "trailing   ", "▁literal▁metaspace", "<bos>",
    "<eos><pad>", "<start_of_turn>user\nhi<end_of_turn>", "<0x41><0xFF>", "<unused0>", "<unk>",
    "Ġ Ċ ĉ", "e\u0301 vs \u00e9", "\u0301alone", "\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea",
    "漢字かな交じり文", "नमस्ते", "\ufeffmark", "\ufffd", "\uffff\U0010ffff", "a\u200db",
    "0123456789 3.14159", "١٢٣ ½ ²", "\ufb01 ligature", "İstanbul ıi", "\ue000 private",
]  # fmt: skip

texts = st.lists(st.one_of(st.text(), st.sampled_from(AWKWARD)), max_size=6).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=texts)
def test_any_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_text_never_makes_a_control_token(tokenizer, text):
    assert not any(tokenizer.is_control(id_) for id_ in tokenizer.encode(text))


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(before=texts, after=texts)
def test_encoding_is_additive_at_line_ends(tokenizer, before, after):
    line = before + "\n"
    assert tokenizer.encode(line + after) == tokenizer.encode(line) + tokenizer.encode(after)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_every_digit_is_a_token_of_its_own(tokenizer, text):
    for piece in tokenizer.pieces(tokenizer.encode(text + "2026 12x34")):
        assert len(piece) == 1 or not any("0" <= sign <= "9" for sign in piece) or "\\x" in piece


def test_encoding_together_is_encoding_one_by_one(tokenizer):
    assert tokenizer.encode_all(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]


def test_real_texts_come_back_unchanged(tokenizer, shared_data):
    for name in ("tinyshakespeare/input.txt.gz", "wikitext2/valid.txt.gz", "gsm8k/train.jsonl.gz"):
        text = gzip.decompress((shared_data / name).read_bytes()).decode()[:400_000]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_ids_have_gemmas_meaning(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert (tokenizer.controls.unk, tokenizer.controls.mask) == (3, 4)
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == (5, 6)
    assert tokenizer.encode("a", bos=True, eos=True)[0] == 2
    assert tokenizer.encode("a", bos=True, eos=True)[-1] == 1
    assert tokenizer.pieces(range(16)) == list(CONTROLS)
    assert not tokenizer.eos_is_pad


def test_the_vocabulary_has_the_size_asked_for(tokenizer):
    assert tokenizer.vocab_size == 1024
    assert tokenizer.encode("x" * 3 + "é漢")[-1] < 1024


def test_the_smallest_vocabulary_writes_everything_in_bytes(source_texts):
    smallest = train_tokenizer(source_texts, 272)
    text = "def é(): return '漢'\n"
    assert len(smallest.encode(text)) == len(text.encode())
    assert smallest.decode(smallest.encode(text)) == text


def test_a_bigger_vocabulary_needs_fewer_tokens(source_texts, tokenizer):
    text = "".join(source_texts)
    sizes = [len(train_tokenizer(source_texts, size).encode(text)) for size in (272, 600)]
    assert sizes[0] > sizes[1] > len(tokenizer.encode(text))


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "ok \udc80"])
def test_a_lone_surrogate_is_refused(tokenizer, text):
    for encode in (tokenizer.encode, tokenizer.encode_with_controls):
        with pytest.raises(DataError, match=r"lone surrogate U\+D[89A-F]"):
            encode(text)
    with pytest.raises(DataError, match="text 1 is not valid Unicode"):
        tokenizer.encode_all(["fine", text])


@pytest.mark.parametrize("wrong", [None, 3, b"bytes"])
def test_what_is_no_text_is_refused(tokenizer, wrong):
    with pytest.raises(DataError, match="expected str"):
        tokenizer.encode(wrong)


@pytest.mark.parametrize("wrong", [-1, 1024, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, wrong):
    with pytest.raises(DataError, match=f"token id {wrong} lies outside"):
        tokenizer.decode([5, wrong])
    with pytest.raises(DataError, match=f"token id {wrong} lies outside"):
        tokenizer.stream().feed(wrong)


@pytest.mark.parametrize("corpus", [[], [""], ["", ""]])
def test_an_empty_corpus_is_refused(corpus):
    with pytest.raises(DataError, match="the corpus is empty"):
        train_tokenizer(corpus, 300)


def test_corpora_that_are_no_texts_are_refused():
    with pytest.raises(DataError, match="is one string"):
        train_tokenizer("a corpus", 300)
    with pytest.raises(DataError, match="text 1 of the corpus is int"):
        train_tokenizer(["a", 1], 300)
    with pytest.raises(DataError, match="text 1 of the corpus holds a lone surrogate"):
        train_tokenizer(["a", "b\ud800"], 300)


@pytest.mark.parametrize("size", [-1, 0, 16, 256, 271])
def test_a_vocabulary_without_room_for_controls_and_bytes_is_refused(size):
    with pytest.raises(ConfigError, match="at least 272"):
        train_tokenizer(["text"], size)


def test_too_little_text_for_the_vocabulary_is_refused_with_the_size_it_gives():
    with pytest.raises(DataError, match=r"gives (\d+) entries, vocab_size asks for 5000") as caught:
        train_tokenizer(["the cat and the dog and the cat"], 5000)
    possible = int(str(caught.value).split("gives ")[1].split()[0])
    text = "the cat and the dog"
    trained = train_tokenizer(["the cat and the dog and the cat"], possible)
    assert trained.decode(trained.encode(text)) == text


def test_rare_characters_leave_room_for_frequent_ones():
    common, rare = "abc abd " * 3000, "".join(chr(0x4E00 + n) for n in range(400))
    trained = train_tokenizer([common + rare], 280, coverage=0.9)
    assert len(trained.encode("c")) == 1
    assert len(trained.encode(rare[7])) == 3
    assert trained.decode(trained.encode(common + rare)) == common + rare


TRAIN = """
import sys
from cabochon.data.corpus import standard_library
from cabochon.data.tokenizer import train_tokenizer
texts = [each.text for each in standard_library().train][:60]
texts.append("é漢字🙂 rare ☃ characters ∀∂" * 3)
sys.stdout.write(train_tokenizer(texts, 2048).fingerprint())
"""


def test_training_gives_the_same_bits_in_every_process():
    found = set()
    for seed, threads in (("1", "false"), ("2", "true")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": threads}
        run = subprocess.run(
            [sys.executable, "-c", TRAIN],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(run.stdout)
    assert len(found) == 1
    assert len(found.pop()) == 64


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.difference(tokenizer) is None
    assert loaded.controls == tokenizer.controls
    assert loaded.chat_template == tokenizer.chat_template
    again = tmp_path / "again"
    loaded.save(again)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_bytes_are_ordinary_entries_and_not_added_tokens(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert [each["content"] for each in content["added_tokens"]] == list(CONTROLS)
    assert content["model"]["vocab"]["<0x00>"] == 16
    assert content["model"]["vocab"]["<0xFF>"] == 271


def test_tokenizers_of_equal_size_are_told_apart(source_texts, tokenizer):
    other = train_tokenizer([*source_texts[::-1][:2], "zebra quagga " * 500], 1024)
    assert other.vocab_size == tokenizer.vocab_size
    assert other.fingerprint() != tokenizer.fingerprint()
    assert "ids mean something else" in tokenizer.difference(other)
    smaller = train_tokenizer(source_texts, 600)
    assert "1024 entries against 600" in tokenizer.difference(smaller)


def test_a_change_of_control_ids_or_merges_changes_the_fingerprint(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps(settings | {"eos_token": "<end_of_turn>"}), "utf-8")
    turned = Tokenizer.load(tmp_path)
    assert turned.fingerprint() != tokenizer.fingerprint()
    assert tokenizer.difference(turned) == "eos is 1 against 6"
    config.write_text(json.dumps(settings), "utf-8")
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["model"]["merges"].reverse()
    file.write_text(json.dumps(content), "utf-8")
    merged = Tokenizer.load(tmp_path)
    assert merged.fingerprint() != tokenizer.fingerprint()
    assert tokenizer.difference(merged) == "the same entries, but merged or cut differently"
    content["model"]["merges"].reverse()
    content["pre_tokenizer"]["pattern"]["Regex"] = r"\p{N}+|\p{L}+|\s+"
    file.write_text(json.dumps(content), "utf-8")
    cut = Tokenizer.load(tmp_path)
    assert tokenizer.difference(cut) == "the same entries, but merged or cut differently"


def test_another_spelling_of_the_same_files_has_the_same_fingerprint(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    for name in ("normalizer", "truncation", "padding", "post_processor"):
        content.pop(name)
    content["model"].pop("dropout")
    file.write_text(json.dumps(content, indent=4, sort_keys=True), "utf-8")
    assert Tokenizer.load(tmp_path).fingerprint() == tokenizer.fingerprint()


def test_eos_that_is_also_padding_is_refused_where_it_must_be_learned(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text("utf-8")) | {"pad_token": {"content": "<eos>"}}
    config.write_text(json.dumps(settings), "utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_is_pad
    with pytest.raises(TokenizerMismatch, match="EOS and PAD are the same token, '<eos>'"):
        loaded.learnable_end()


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path):
    with pytest.raises(FolderError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FolderError, match=r"it holds tokenizer\.model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"model": 3}', b"\x00\x01", b"{\xff}"])
def test_a_damaged_tokenizer_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FolderError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_control_token_that_the_vocabulary_lacks_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(TokenizerMismatch, match=r"tokenizer_config\.json names '</s>'"):
        Tokenizer.load(tmp_path)
    config.write_text("{")
    with pytest.raises(FolderError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_control_ids_are_found_where_the_tokenizer_names_none(tokenizer, tmp_path, file):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / file).write_text(json.dumps({"eos_token_id": [1, 6], "bos_token_id": 2}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.pad_id) == (1, 2, None)
    with pytest.raises(TokenizerMismatch, match="no pad token"):
        loaded.control("pad")
    (tmp_path / file).write_text(json.dumps({"eos_token_id": 70000}))
    with pytest.raises(TokenizerMismatch, match="names 70000 as eos_token_id"):
        Tokenizer.load(tmp_path)


def test_truncation_and_padding_in_a_file_are_left_aside(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    file.write_text(json.dumps(content), "utf-8")
    text = "a document of more than four tokens"
    assert Tokenizer.load(tmp_path).encode(text) == tokenizer.encode(text)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 1023), max_size=40))
def test_a_stream_gives_what_decoding_gives_whatever_the_tokens(tokenizer, ids):
    stream = tokenizer.stream()
    assert "".join([stream.feed(id_) for id_ in ids] + [stream.finish()]) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_a_stream_of_text_gives_whole_characters_only(tokenizer, text):
    stream, shown = tokenizer.stream(), ""
    for id_ in tokenizer.encode(text):
        shown += stream.feed(id_)
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""


def test_a_character_in_bytes_appears_with_its_last_byte(tokenizer):
    stream = tokenizer.stream()
    assert [stream.feed(id_) for id_ in tokenizer.encode("🙂")] == ["", "", "", "🙂"]
    stream = tokenizer.stream()
    assert [stream.feed(id_) for id_ in tokenizer.encode("🙂")[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_a_save_that_fails_leaves_the_earlier_one(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    other = train_tokenizer(["while True: number = number // 17\n"], 272 + 4)
    real = Path.write_text

    def full(self, text, *args, **kwargs):
        real(self, text[: len(text) // 2], *args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        other.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint() == tokenizer.fingerprint()


def test_a_save_over_another_one_leaves_no_template_of_it(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    Tokenizer(content, tokenizer.controls, settings={}).save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template is None
