"""Bad input gets one clear message, that names the place and what to do, and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from workshop import Done, Workshop, call, write_jsonl

import cabochon
from cabochon.cli import pretrain
from cabochon.cli.rows import Rows
from cabochon.cli.settings import RunSettings
from cabochon.data.tokenizer import Tokenizer


def assert_refused(done: Done, *said: str, code: int = 1) -> None:
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    for part in said:
        assert part in done.err


def train_on(workshop: Workshop, path: Path, *words: object, algorithm: str = "pretrain") -> Done:
    """Trains into a folder that must not come into being."""
    out = path.parent / "refused"
    done = workshop.train("--data", path, "--out", out, *words, algorithm=algorithm)
    assert not out.exists()
    return done


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
def test_an_empty_corpus(workshop: Workshop, tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert_refused(train_on(workshop, tmp_path / name), str(tmp_path / name), "empty")


def test_a_corpus_of_no_text_at_all_for_a_tokenizer(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": ""}])
    done = call("data", "tokenizer", "--data", corpus, "--out", tmp_path / "tok")
    assert_refused(done, "empty")
    assert not (tmp_path / "tok").exists()


def test_a_line_that_is_not_json(workshop: Workshop, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "fine"}\n{"text": broken\n')
    assert_refused(train_on(workshop, path), f"{path}:2", "not JSON")


def test_a_line_that_lacks_the_field(workshop: Workshop, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": "fine"}, {"txt": "not so"}])
    assert_refused(train_on(workshop, path), f"{path}:2", "no field 'text'", "'txt'")


def test_bytes_that_are_not_utf8(workshop: Workshop, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    assert_refused(train_on(workshop, path), f"{path}:2", "UTF-8")
    text = tmp_path / "c.txt"
    text.write_bytes(b"caf\xe9")
    assert_refused(train_on(workshop, text), str(text), "UTF-8")


def test_a_file_that_is_not_there(workshop: Workshop, tmp_path: Path) -> None:
    assert_refused(train_on(workshop, tmp_path / "none.jsonl"), "none.jsonl does not exist")


def test_a_long_document_is_split_without_losing_a_token(
    workshop: Workshop, tmp_path: Path
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "a long story " * 200}])
    words = ("--tokenizer", workshop.tokenizer, "--context", 64, "--out", tmp_path / "rows")
    done = call("data", "pack", "--data", corpus, *words, "--json")
    tokenizer = cabochon.load(workshop.model)[1]
    length = len(tokenizer.encode("a long story " * 200, bos=True, eos=True))
    assert done.answer["tokens"] == length > 64
    assert done.answer["targets"] == length - 1


def test_a_conversation_longer_than_the_context(workshop: Workshop, tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "completion": "yes"}, {"prompt": "hi", "completion": "no " * 99}]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    done = train_on(workshop, path, algorithm="sft")
    assert_refused(done, f"{path}:2", "tokens, a row holds 64", "--too-long drop")
    words = ("--data", path, "--too-long", "drop", "--out", tmp_path / "run", "--steps", 1)
    done = workshop.train(*words, algorithm="sft")
    assert done.code == 0, done.err
    assert "left out 1 conversations longer than 64 tokens; 1 stay" in done.err


def test_a_conversation_with_a_system_turn(workshop: Workshop, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    path = write_jsonl(tmp_path / "c.jsonl", [{"messages": messages}])
    done = train_on(workshop, path, algorithm="sft")
    assert_refused(done, f"{path}:1", "system", "first user turn")


@pytest.fixture
def stranger(workshop: Workshop, tmp_path: Path) -> Path:
    """A tokenizer of the same size as the workshop's, and of other content."""
    corpus = write_jsonl(tmp_path / "other.jsonl", [{"text": "the quick brown fox " * 30}] * 3)
    out = tmp_path / "stranger"
    words = ("--data", workshop.chats, corpus, "--vocab-size", 300, "--out", out)
    done = call("data", "tokenizer", "--data", corpus, "--vocab-size", 300, "--out", out)
    assert done.code == 0, (done.err, words)
    content = json.loads((out / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"\u2603{n}": len(vocabulary) + n for n in range(400 - len(vocabulary))}
    (out / "tokenizer.json").write_text(json.dumps(content))
    return out


def test_a_tokenizer_that_is_not_the_models_by_content(
    workshop: Workshop, tmp_path: Path, stranger: Path
) -> None:
    words = ("--model", workshop.run, "--tokenizer", stranger, "--out", tmp_path / "run")
    assert_refused(workshop.train(*words), "differ", "ids mean something else")
    swapped = tmp_path / "swapped"
    shutil.copytree(workshop.model, swapped)
    shutil.copy(stranger / "tokenizer.json", swapped)
    done = call("generate", swapped, "--prompt", "x")
    assert_refused(done, "another tokenizer than its model was made with")


def test_a_teacher_of_another_vocabulary(
    workshop: Workshop, tmp_path: Path, stranger: Path
) -> None:
    words = ("--teacher", workshop.run, "--tokenizer", stranger, "--out", tmp_path / "run")
    assert_refused(workshop.train(*words), "do not share a vocabulary", "ids mean something else")
    assert not (tmp_path / "run").exists()


def test_rows_packed_with_another_tokenizer(
    workshop: Workshop, tmp_path: Path, stranger: Path
) -> None:
    words = ("--tokenizer", stranger, "--context", 64, "--out", tmp_path / "rows")
    assert call("data", "pack", "--data", workshop.corpus, *words).code == 0
    done = train_on(workshop, tmp_path / "rows")
    assert_refused(done, "packed with tokenizer", "pack the text again")


def test_rows_of_another_length(workshop: Workshop, tmp_path: Path) -> None:
    words = ("--tokenizer", workshop.tokenizer, "--context", 32, "--out", tmp_path / "rows")
    assert call("data", "pack", "--data", workshop.corpus, *words).code == 0
    done = train_on(workshop, tmp_path / "rows")
    assert_refused(done, "rows of 32 tokens", "--context 32", code=2)


def test_an_end_that_is_also_the_padding(workshop: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "tok"
    shutil.copytree(workshop.tokenizer, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["pad_token"] = settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    done = workshop.train("--tokenizer", folder, "--out", tmp_path / "run")
    assert_refused(done, "EOS and PAD are the same token")
    assert not (tmp_path / "run").exists()
    examined = call("doctor", "pretrain", "--data", workshop.corpus, "--tokenizer", folder)
    assert examined.code == 1
    assert "WRONG  markers: EOS and PAD are the same token" in examined.out


def test_an_unknown_key_of_a_settings_file(workshop: Workshop, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("learing_rate: 1e-3\n")
    done = workshop.train("--config", file, "--out", tmp_path / "run")
    said = "unknown key 'learing_rate': did you mean 'learning_rate'?"
    assert_refused(done, said, str(file), code=2)


def test_an_unknown_flag(workshop: Workshop, tmp_path: Path) -> None:
    done = workshop.train("--learing-rate", "1e-3", "--out", tmp_path / "run")
    assert_refused(done, "--learing-rate", "--learning-rate", code=2)


def test_an_unknown_preset(workshop: Workshop, tmp_path: Path) -> None:
    done = workshop.train("--model", "gema2-nano", "--out", tmp_path / "run")
    assert_refused(done, "no preset 'gema2-nano'", "gemma2-nano", code=2)


def test_a_model_that_is_not_there(workshop: Workshop, tmp_path: Path) -> None:
    words = ("--model", tmp_path / "none", "--out", tmp_path / "run")
    assert_refused(workshop.train(*words), "neither a folder that is there nor a preset", code=2)
    words = ("--tokenizer", workshop.corpus, "--out", tmp_path / "run")
    assert_refused(workshop.train(*words), f"{workshop.corpus} is a file")


def test_a_run_whose_settings_are_no_settings(workshop: Workshop, tmp_path: Path) -> None:
    for text, said in ((": [", "is not YAML"), ("- a", "holds list"), ("a: 1", "neither an")):
        (tmp_path / "config.yaml").write_text(text)
        done = call("resume", tmp_path)
        assert done.code in {1, 2}
        assert said in done.err


def test_sizes_that_make_no_model(workshop: Workshop, tmp_path: Path) -> None:
    words = ("--model", "gemma2-nano", "--model.heads", 3, "--model.kv-heads", 2)
    done = workshop.train(*words, "--out", tmp_path / "run")
    assert_refused(done, "heads must be a multiple of kv_heads", code=2)


def sharded(workshop: Workshop, folder: Path) -> Path:
    model, tokenizer = cabochon.load(workshop.model)
    cabochon.save(model, tokenizer, folder)
    from cabochon.folders import save

    save(model, tokenizer, folder, max_shard_bytes=20_000)
    return folder


def test_a_model_folder_with_a_missing_shard(workshop: Workshop, tmp_path: Path) -> None:
    folder = sharded(workshop, tmp_path / "model")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert call("generate", folder, "--prompt", "x", "--max-new-tokens", 1).code == 0
    shards[1].unlink()
    assert_refused(call("generate", folder, "--prompt", "x"), shards[1].name)
    assert_refused(call("export", folder, tmp_path / "out"), shards[1].name)
    assert not (tmp_path / "out").exists()
    assert call("doctor", folder).code == 1


def test_a_shard_that_is_cut_short(workshop: Workshop, tmp_path: Path) -> None:
    folder = sharded(workshop, tmp_path / "model")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_refused(call("generate", folder, "--prompt", "x"), shard.name)


def test_a_damaged_checkpoint_is_named_and_the_one_before_stays(
    workshop: Workshop, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert workshop.train("--out", run).code == 0
    shutil.rmtree(run / "checkpoints" / "step-6")
    damaged = run / "checkpoints" / "step-4" / "model" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    done = call("resume", run)
    assert_refused(done, "model/model.safetensors", "damaged")
    with safe_open(damaged, "pt") as file:
        assert file.keys()


def test_a_run_directory_that_is_already_there(workshop: Workshop) -> None:
    done = workshop.train("--out", workshop.run)
    assert_refused(done, "holds a run already", f"cabochon resume {workshop.run}")


def test_words_that_are_missing_say_which(workshop: Workshop, tmp_path: Path) -> None:
    assert_refused(call("train"), "which algorithm?", "pretrain | sft", code=2)
    assert_refused(call("train", "pretrain"), "--out", code=2)
    out = ("--out", tmp_path / "run")
    assert_refused(call("train", "pretrain", *out), "needs data: --data", code=2)
    data = ("--data", workshop.corpus)
    assert_refused(call("train", "pretrain", *data, *out), "needs a tokenizer", code=2)
    assert_refused(call("resume", tmp_path), "is not a run directory")
    assert_refused(call("generate", tmp_path / "none", "--prompt", "x"), "no model folder or run")
    assert_refused(call("report", tmp_path / "none"), "no run directory")


def test_data_that_change_while_they_are_read(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashed as they were and learned as they are, the run could never be repeated."""
    corpus = tmp_path / "corpus.jsonl"
    shutil.copy(workshop.corpus, corpus)
    real = pretrain.document_rows

    def slow(run: RunSettings, tokenizer: Tokenizer) -> Rows:
        with corpus.open("a", encoding="utf-8") as file:
            file.write('{"text": "one more"}\n')
        return real(run, tokenizer)

    monkeypatch.setattr(pretrain, "document_rows", slow)
    done = workshop.train("--data", corpus, "--out", tmp_path / "run")
    assert_refused(done, "corpus.jsonl was changed while it was being read")
    assert not (tmp_path / "run").exists()


def test_a_run_within_its_own_data(workshop: Workshop, tmp_path: Path) -> None:
    shutil.copy(workshop.corpus, tmp_path / "corpus.jsonl")
    done = workshop.train("--data", tmp_path, "--out", tmp_path / "runs" / "a")
    assert_refused(done, "lies within the data folder", code=2)
    assert not (tmp_path / "runs").exists()


def test_data_that_can_be_read_only_once(workshop: Workshop, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    done = workshop.train("--data", tmp_path / "pipe.jsonl", "--out", tmp_path / "run")
    assert_refused(done, "is a pipe or a device", "write it into a file first")


def test_data_that_are_not_there(workshop: Workshop, tmp_path: Path) -> None:
    done = workshop.train("--data", tmp_path / "none.jsonl", "--out", tmp_path / "run")
    assert_refused(done, "none.jsonl does not exist")
