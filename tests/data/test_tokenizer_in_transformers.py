"""transformers is the oracle: its AutoTokenizer reads our folders, and we read its."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from cabochon.core.errors import DataError
from cabochon.data.chat import Message, encode_chat, encode_prompt, render
from cabochon.data.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def lines(source_texts):
    """Some thousand real lines."""
    return [line for text in source_texts for line in text.splitlines(keepends=True)][:4000]


def ids_of(theirs, text, **options):
    return theirs(text, **options)["input_ids"]


def test_real_lines_have_the_same_ids(tokenizer, theirs, lines):
    assert len(lines) == 4000
    expected = theirs(lines, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_all(lines) == expected
    assert theirs.batch_decode(expected) == lines


def test_public_texts_have_the_same_ids(tokenizer, theirs, shared_data):
    for name in ("wikitext2/valid.txt.gz", "gsm8k/train.jsonl.gz", "tinyshakespeare/input.txt.gz"):
        text = gzip.decompress((shared_data / name).read_bytes()).decode()
        some = text.splitlines(keepends=True)[:1500]
        # WikiText spells <unk>, which is text here and a token there unless asked.
        expected = theirs(some, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode_all(some) == expected


def test_bos_is_added_by_default_there_and_on_request_here(tokenizer, theirs):
    assert ids_of(theirs, "x = 1\n") == tokenizer.encode("x = 1\n", bos=True)


def test_control_ids_agree(tokenizer, theirs):
    assert theirs.bos_token_id == tokenizer.bos_id
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.pad_token_id == tokenizer.pad_id
    assert theirs.unk_token_id == tokenizer.controls.unk
    assert theirs.mask_token_id == tokenizer.controls.mask
    assert theirs.convert_tokens_to_ids("<end_of_turn>") == tokenizer.end_of_turn_id
    assert len(theirs) == tokenizer.vocab_size


def test_skipping_special_tokens_keeps_emoji_and_cjk(tokenizer, theirs):
    text = "漢字 🙂 é"
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert theirs.decode(ids, skip_special_tokens=True) == text == tokenizer.decode(ids)


def test_control_text_is_text_there_too_when_asked(tokenizer, theirs):
    text = "a <bos> and <start_of_turn>model\n"
    split = ids_of(theirs, text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(split) == text
    assert tokenizer.encode_with_controls(text)[0] == ids_of(theirs, text, add_special_tokens=False)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: "<" not in text))
def test_any_text_has_the_same_ids(tokenizer, theirs, text):
    assert tokenizer.encode(text) == ids_of(theirs, text, add_special_tokens=False)


def test_what_transformers_saves_again_is_the_same_tokenizer(tokenizer, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).difference(tokenizer) is None
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ids_of(again, "x = 1\n") == tokenizer.encode("x = 1\n", bos=True)
    assert again.chat_template == tokenizer.chat_template


def test_a_gemma_config_beside_it_does_not_change_the_reading(tokenizer, folder, lines):
    config = transformers.Gemma2Config(vocab_size=tokenizer.vocab_size)
    config.save_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs(lines[:500], add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_all(lines[:500]) == expected


# -- chat -----------------------------------------------------------------------------------------

contents = st.text(max_size=40).filter(lambda text: "<" not in text)


@settings(max_examples=150, deadline=None)
@given(said=st.lists(contents, min_size=1, max_size=5))
def test_the_saved_chat_template_gives_the_same_ids_and_mask(tokenizer, theirs, said):
    roles = ["user", "assistant"]
    rows = [{"role": roles[at % 2], "content": text} for at, text in enumerate(said)]
    messages = [Message(row["role"], row["content"]) for row in rows]
    chat = encode_chat(tokenizer, messages)
    expected = theirs.apply_chat_template(rows, return_dict=True, return_assistant_tokens_mask=True)
    assert list(chat.ids) == expected["input_ids"]
    assert [int(each) for each in chat.mask] == expected["assistant_masks"]
    assert render(messages) == theirs.apply_chat_template(rows, tokenize=False)
    if len(rows) % 2:
        prompt = theirs.apply_chat_template(rows, add_generation_prompt=True, return_dict=True)
        assert encode_prompt(tokenizer, messages) == prompt["input_ids"]


def test_public_conversations_have_the_same_ids(tokenizer, theirs, shared_data):
    text = gzip.decompress((shared_data / "gsm8k" / "train.jsonl.gz").read_bytes()).decode()
    rows = [json.loads(line) for line in text.split("\n")[:200]]
    for row in rows:
        turns = [("user", row["question"]), ("assistant", row["answer"])]
        chat = encode_chat(tokenizer, [Message(*turn) for turn in turns])
        expected = theirs.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert list(chat.ids) == expected["input_ids"]
        assert [int(each) for each in chat.mask] == expected["assistant_masks"]


@pytest.mark.parametrize("roles", [["system", "user"], ["model"], ["user", "user"], ["tool"]])
def test_both_refuse_the_same_conversations(tokenizer, theirs, roles):
    with pytest.raises(DataError):
        encode_chat(tokenizer, [Message(role, "x") for role in roles])
    with pytest.raises(Exception, match=r"system role|must alternate"):
        theirs.apply_chat_template([{"role": role, "content": "x"} for role in roles])


# -- other families -------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(texts):
    """In the manner of GPT-2, Llama 3 and Qwen."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens(["<tool_call>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHATML
    )


def metaspace(texts):
    """In the manner of Llama 2: a space in front, U+2581 for spaces, bytes for the rest."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(texts[:1], trainer)
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    for value in range(256):
        vocabulary.setdefault(f"<0x{value:02X}>", len(vocabulary))
    backend = Backend.from_str(json.dumps(content))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def gemma(texts):
    """Gemma's own class: U+2581 for spaces, bytes for the rest, nothing in front."""
    content = json.loads(metaspace(texts).backend_tokenizer.to_str())
    vocabulary = dict(content["model"]["vocab"])
    names = dict(zip(["<unk>", "<s>", "</s>"], ["<unk>", "<bos>", "<eos>"], strict=True))
    vocabulary = {names.get(piece, piece): id_ for piece, id_ in vocabulary.items()}
    for piece in ("<pad>", "<mask>", "<start_of_turn>", "<end_of_turn>"):
        vocabulary[piece] = len(vocabulary)
    merges = [tuple(pair) for pair in content["model"]["merges"]]
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=merges)


@pytest.fixture(scope="module", params=[byte_level, metaspace, gemma])
def foreign(request, source_texts, tmp_path_factory):
    theirs = request.param(source_texts[:2])
    folder = tmp_path_factory.mktemp("foreign")
    theirs.save_pretrained(folder)
    return theirs, Tokenizer.load(folder)


def test_other_families_are_read_with_the_same_ids(foreign, lines):
    theirs, ours = foreign
    expected = theirs(lines[:1000], add_special_tokens=False)["input_ids"]
    assert ours.encode_all(lines[:1000]) == expected
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert [ours.decode(ids) for ids in expected] == theirs.batch_decode(expected)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_a_stream_of_another_family_gives_what_decoding_gives(foreign, text):
    _, ours = foreign
    ids = ours.encode(text)
    stream = ours.stream()
    assert "".join([stream.feed(id_) for id_ in ids] + [stream.finish()]) == ours.decode(ids)


def test_control_text_is_plain_for_other_families(foreign):
    _, ours = foreign
    for control in ("<|im_end|>", "</s>"):
        ids = ours.encode(f"a {control} b")
        assert not any(ours.is_control(id_) for id_ in ids)
        assert ours.decode(ids) == f"a {control} b"


def test_another_familys_chat_template_gives_its_ids_and_the_models_turns(source_texts, tmp_path):
    theirs = byte_level(source_texts[:2])
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    rows = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "\n\nWhat is 2 + 2?"},
        {"role": "assistant", "content": "4\n"},
        {"role": "user", "content": "And 漢?"},
        {"role": "assistant", "content": "🙂"},
    ]
    chat = encode_chat(ours, [Message(**row) for row in rows])
    assert list(chat.ids) == theirs.apply_chat_template(rows, return_dict=True)["input_ids"]
    spoken = [id_ for id_, counts in zip(chat.ids, chat.mask, strict=True) if counts]
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    assert spoken == [*ours.encode("4\n"), end, *ours.encode("🙂"), end]
    prompt = theirs.apply_chat_template(rows[:4], add_generation_prompt=True, return_dict=True)
    assert encode_prompt(ours, [Message(**row) for row in rows[:4]]) == prompt["input_ids"]
