"""Teachers of `train pretrain`: a folder, a cache of it, or a server, teach the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from workshop import SMALL, Done, Workshop, call, write_jsonl

import cabochon
from cabochon.data.teacher_cache import TeacherCache
from cabochon.data.teacher_cache_writing import write_cache

sys.path.append(str(Path(__file__).parents[1] / "generation"))
import local_server

V = 400


def make_cache(workshop: Workshop, out: Path, *words: object) -> Done:
    return call(
        "data", "cache-teacher", workshop.run, "--data", workshop.corpus, "--context", 64,
        "--out", out, "--threads", 1, "--device", "cpu", *words,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the whole vocabulary."""
    out = tmp_path_factory.mktemp("caches") / "whole"
    done = make_cache(workshop, out, "--top-k", V)
    assert done.code == 0, done.err
    assert done.out == f"{out}\n"
    return out


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    model, _ = cabochon.load(run / "checkpoints" / "step-6" / "model")
    return model.state_dict()


def assert_refused(done: Done, *said: str, code: int = 1) -> None:
    assert done.code == code, done.err
    for part in said:
        assert part in done.err


# --- the same updates ---


def test_a_cache_of_the_whole_vocabulary_teaches_what_the_teacher_does(
    workshop: Workshop, tmp_path: Path, cache: Path
) -> None:
    for name, teacher in (("resident", workshop.run), ("cached", cache)):
        done = workshop.train("--teacher", teacher, "--out", tmp_path / name)
        assert done.code == 0, done.err
    for found, expected in zip(
        metrics(tmp_path / "cached"), metrics(tmp_path / "resident"), strict=True
    ):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert found["kl"] == pytest.approx(expected["kl"], abs=1e-4)
    one, other = weights(tmp_path / "cached"), weights(tmp_path / "resident")
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], atol=2e-4, rtol=0)


def test_a_server_teaches_what_its_model_does(workshop: Workshop, tmp_path: Path) -> None:
    pytest.importorskip("httpx2")
    model, tokenizer = cabochon.load(workshop.model)
    world = local_server.World(model=model, tokenizer=tokenizer, max_logprobs=V)
    with local_server.serving(world) as transport:
        done = make_cache(workshop, tmp_path / "cache", "--top-k", 30)
        assert done.code == 0, done.err
        short = ("--steps", 2, "--context", 48)
        served = workshop.train(
            "--teacher", transport.url, "--teacher-top-k", V, *short, "--out", tmp_path / "served"
        )
        assert served.code == 0, served.err
        examined = call(
            "doctor", "pretrain", "--tokenizer", workshop.tokenizer, "--data", workshop.corpus,
            "--teacher", transport.url,
        )  # fmt: skip
        assert "well   teacher's server" in examined.out
    resident = workshop.train("--teacher", workshop.run, *short, "--out", tmp_path / "resident")
    assert resident.code == 0, resident.err
    for name in ("loss", "kl"):
        found = [each[name] for each in metrics(tmp_path / "served")]
        assert found == pytest.approx([e[name] for e in metrics(tmp_path / "resident")], abs=1e-3)
    manifest = json.loads((tmp_path / "served" / "manifest.json").read_text())
    assert manifest["inputs"]["teachers"]["teacher"] == f"the server at {transport.url}"


def test_a_server_is_cached_like_a_folder(workshop: Workshop, tmp_path: Path) -> None:
    pytest.importorskip("httpx2")
    model, tokenizer = cabochon.load(workshop.model)
    world = local_server.World(model=model, tokenizer=tokenizer)
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": "def f(x):\n    return x"}] * 2)
    with local_server.serving(world) as transport:
        done = call(
            "data", "cache-teacher", transport.url, "--data", few, "--tokenizer",
            workshop.tokenizer, "--top-k", 9, "--out", tmp_path / "served", "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
    assert done.answer["documents"] == 1
    ids = tokenizer.encode("def f(x):\n    return x", bos=True, eos=True)
    batch = cabochon.core.TokenBatch.of([ids])
    found = TeacherCache.open(tmp_path / "served")(batch)
    law = model(batch).logits(slice(0, -1)).log_softmax(-1)
    assert isinstance(found, cabochon.core.TopKTargets)
    torch.testing.assert_close(found.logprob[0, :-1], law.topk(9).values, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "words", [("--top-k", 8), ("--top-k", 8, "--store", "float16"), ("--draws", 16)]
)
def test_less_than_the_whole_teaches_too_and_resumes_bit_for_bit(
    workshop: Workshop, tmp_path: Path, words: tuple[object, ...]
) -> None:
    done = make_cache(workshop, tmp_path / "cache", *words)
    assert done.code == 0, done.err
    said = ("draws are unbiased",) if words[0] == "--draws" else ("not stored: ", "too low by no")
    assert all(part in done.err for part in said)
    teach = ("--teacher", tmp_path / "cache")
    straight = workshop.train(*teach, "--out", tmp_path / "straight")
    assert straight.code == 0, straight.err
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    for folder in (tmp_path / "again" / "checkpoints").iterdir():
        if folder.name == "step-6":
            shutil.rmtree(folder)
    again = call("resume", tmp_path / "again")
    assert again.code == 0, again.err
    for name, weight in weights(tmp_path / "again").items():
        assert torch.equal(weight, weights(tmp_path / "straight")[name])


# --- what belongs together ---


def test_a_run_remembers_its_cache(workshop: Workshop, tmp_path: Path) -> None:
    assert make_cache(workshop, tmp_path / "cache", "--top-k", 4).code == 0
    done = workshop.train("--teacher", tmp_path / "cache", "--out", tmp_path / "run", "--steps", 4)
    assert done.code == 0, done.err
    identity = TeacherCache.open(tmp_path / "cache").sha256()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["inputs"]["teachers"] == {"teacher": identity}
    for folder in (tmp_path / "run" / "checkpoints").glob("step-4"):
        shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "cache")
    assert make_cache(workshop, tmp_path / "cache", "--top-k", 5).code == 0
    assert_refused(call("resume", tmp_path / "run"), "teachers.teacher: was")


def test_a_cache_beside_its_teacher_is_compared_with_it(
    workshop: Workshop, tmp_path: Path, cache: Path
) -> None:
    well = ("--teacher", workshop.run, "--teacher-cache", cache)
    assert workshop.train(*well, "--out", tmp_path / "well", "--steps", 1).code == 0
    other = workshop.train("--seed", 3, "--steps", 2, "--out", tmp_path / "other")
    assert other.code == 0, other.err
    wrong = ("--teacher", tmp_path / "other", "--teacher-cache", cache)
    done = workshop.train(*wrong, "--out", tmp_path / "wrong")
    assert_refused(done, "was made from another teacher", "model.safetensors differ")
    looked = call(
        "doctor", "pretrain", *wrong, "--tokenizer", workshop.tokenizer, "--data", workshop.corpus,
        "--context", 64,
    )  # fmt: skip
    assert looked.code == 1
    assert "WRONG  teacher and cache: " in looked.out
    capped = tmp_path / "capped"
    shutil.copytree(workshop.model, capped)
    values = json.loads((capped / "config.json").read_text())
    values["final_logit_softcapping"] = 7.0
    (capped / "config.json").write_text(json.dumps(values))
    wrong = ("--teacher", capped, "--teacher-cache", cache)
    done = workshop.train(*wrong, "--out", tmp_path / "wrong")
    assert_refused(done, "was made from another teacher", "config.json differ")
    assert not (tmp_path / "wrong").exists()


def test_other_text_another_tokenizer_or_other_rows_are_refused(
    workshop: Workshop, tmp_path: Path, cache: Path
) -> None:
    out = ("--out", tmp_path / "run")
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "something else " * 9}])
    done = workshop.train("--teacher", cache, "--data", other, *out)
    assert_refused(done, "is not in the teacher cache", "made from other text")
    done = workshop.train("--teacher", cache, "--context", 32, *out)
    assert_refused(done, "is not in the teacher cache", "--context splits documents")
    words = ("--data", other, workshop.corpus, "--vocab-size", 380, "--out", tmp_path / "tok")
    assert call("data", "tokenizer", *words).code == 0
    done = workshop.train("--teacher", cache, "--tokenizer", tmp_path / "tok", *out)
    assert_refused(done, "was made with tokenizer")
    examined = call(
        "doctor", "pretrain", "--teacher", cache, "--data", workshop.corpus,
        "--tokenizer", tmp_path / "tok",
    )  # fmt: skip
    assert examined.code == 1
    assert "WRONG  teacher cache: " in examined.out
    assert not (tmp_path / "run").exists()


def test_a_cut_cache_is_refused_and_an_unfinished_one_too(
    workshop: Workshop, tmp_path: Path, cache: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(cache, broken)
    shard = next(broken.glob("shard-*"))
    os.truncate(shard, shard.stat().st_size // 2)
    done = workshop.train("--teacher", broken, "--out", tmp_path / "run")
    assert_refused(done, f"{shard.name} is cut short")
    (broken / "manifest.json").rename(broken / "making.json")
    done = workshop.train("--teacher", broken, "--out", tmp_path / "run")
    assert_refused(done, "is not finished")


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("--top-k", 401), "top_k must lie in 1 to 400", 2),
        (("--draws", -1), "draws must be 0", 2),
        (("--draws", 4, "--top-k", 4), "give one", 2),
        (("--teacher-model", "x"), "is for a server", 2),
    ],
)
def test_caching_refuses_what_cannot_be(
    workshop: Workshop, tmp_path: Path, words: tuple[object, ...], said: str, code: int
) -> None:
    assert_refused(make_cache(workshop, tmp_path / "cache", *words), said, code=code)
    assert not (tmp_path / "cache").exists()


def test_rows_beyond_the_teachers_context_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    done = call(
        "data", "cache-teacher", workshop.run, "--data", workshop.corpus, "--context", 9999,
        "--out", tmp_path / "cache",
    )  # fmt: skip
    assert_refused(done, "rows of 9999 tokens are longer than the 256", code=2)


def test_caching_needs_a_teacher_data_and_a_place(workshop: Workshop, cache: Path) -> None:
    assert_refused(call("data", "cache-teacher"), "needs TEACHER", code=2)
    done = call("data", "cache-teacher", workshop.run, "--data", workshop.corpus)
    assert_refused(done, "needs --out FOLDER", code=2)
    done = call("data", "cache-teacher", cache, "--data", workshop.corpus, "--out", "x")
    assert_refused(done, "is a teacher cache already", code=2)
    done = call("data", "cache-teacher", "http://x", "--data", workshop.corpus, "--out", "x")
    assert_refused(done, "--tokenizer FOLDER names the student's", code=2)


def test_a_teacher_cache_that_is_none(workshop: Workshop, tmp_path: Path) -> None:
    done = workshop.train("--teacher-cache", workshop.run, "--out", tmp_path / "run")
    assert_refused(done, "is no teacher cache", code=2)
    done = workshop.train("--teacher-model", "large", "--out", tmp_path / "run")
    assert_refused(done, "--teacher-model is for a server", code=2)


def test_killed_while_caching_it_goes_on_bit_for_bit(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards of a teacher on real text, after `kill -9` of the whole program."""
    monkeypatch.setitem(write_cache.__kwdefaults__, "shard_bytes", 1)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    program = (
        "import sys; from cabochon.data import teacher_cache_writing as w; "
        "w.write_cache.__kwdefaults__['shard_bytes'] = 1; "
        "from cabochon.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [
        "data", "cache-teacher", workshop.run, "--data", workshop.corpus, "--context", 64,
        "--draws", 9, "--batch-size", 4, "--threads", 1, "--device", "cpu", "--out",
    ]  # fmt: skip

    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words), str(killed)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and len(list(killed.glob("shard-*"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "manifest.json").exists()
    for out in (killed, straight):
        assert call(*words, out).code == 0
    shards = sorted(each.name for each in straight.iterdir())
    assert len(shards) > 3
    for name in shards:
        assert (killed / name).read_bytes() == (straight / name).read_bytes(), name


# --- before a run ---


def test_a_plan_counts_no_teacher_that_is_elsewhere(workshop: Workshop, cache: Path) -> None:
    done = call(
        "plan", "pretrain", "--data", workshop.corpus, "--tokenizer", workshop.tokenizer,
        "--context", 64, "--batch-size", 2, "--teacher", cache, *SMALL, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.answer["memory_bytes"]["teacher"] == 0


def test_inspecting_a_cache_says_what_it_loses(workshop: Workshop, cache: Path) -> None:
    readable = call("data", "inspect", cache, "--tokenizer", workshop.tokenizer)
    assert readable.code == 0, readable.err
    assert "uneven          0.0" in readable.out
    found = call("data", "inspect", cache, "--json").answer
    assert found["identity"]["width"] == V
    assert found["losses"]["tail"] == 0.0


def test_the_doctor_looks_at_a_cache(workshop: Workshop, tmp_path: Path, cache: Path) -> None:
    words = ("--tokenizer", workshop.tokenizer, "--context", 64)
    well = call("doctor", "pretrain", *words, "--teacher", cache, "--data", workshop.corpus)
    assert well.code == 0, well.out
    assert "well   teacher cache: " in well.out
    assert "well   teacher cache's text: every document is in it" in well.out
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "something else " * 9}])
    wrong = call("doctor", "pretrain", *words, "--teacher", cache, "--data", other)
    assert wrong.code == 1
    assert "WRONG  teacher cache's text" in wrong.out


def test_the_doctor_compares_soft_caps_and_bos_habits(workshop: Workshop, tmp_path: Path) -> None:
    words = ("--tokenizer", workshop.tokenizer, "--data", workshop.corpus)
    same = call("doctor", "pretrain", *words, "--teacher", workshop.run)
    assert "well   teacher's BOS: is 2, and it puts one in front" in same.out
    assert "they differ" not in same.out
    odd = tmp_path / "odd"
    shutil.copytree(workshop.model, odd)
    values = json.loads((odd / "config.json").read_text())
    values["final_logit_softcapping"] = None
    (odd / "config.json").write_text(json.dumps(values))
    habits = json.loads((odd / "tokenizer_config.json").read_text())
    habits["add_bos_token"] = False
    (odd / "tokenizer_config.json").write_text(json.dumps(habits))
    found = call("doctor", "pretrain", *words, "--teacher", odd)
    assert found.code == 1
    assert "logits 30 against none; they differ" in found.out
    assert "WRONG  teacher's BOS" in found.out
    short = call("doctor", "pretrain", *words, "--teacher", workshop.run, "--context", 9999)
    assert "WRONG  teacher's context" in short.out


# --- another tokenizer ---


@pytest.fixture(scope="module")
def other_tokenizer(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizers") / "other"
    text = write_jsonl(out.parent / "text.jsonl", [{"text": "def return self: for in if " * 9}] * 2)
    words = ("--data", text, workshop.corpus, "--vocab-size", 340, "--out", out)
    assert call("data", "tokenizer", *words).code == 0
    return out


def test_a_teacher_of_another_tokenizer_teaches_when_asked(
    workshop: Workshop, tmp_path: Path, other_tokenizer: Path
) -> None:
    words = ("--teacher", workshop.run, "--tokenizer", other_tokenizer)
    plain = workshop.train(*words, "--out", tmp_path / "plain")
    assert_refused(plain, "do not share a vocabulary", "--cross-tokenizer")
    words = (*words, "--cross-tokenizer", "--steps", 12, "--learning-rate", 3e-3)
    done = workshop.train(*words, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    found = metrics(tmp_path / "run")
    assert found[-1]["kl"] < found[0]["kl"]
    assert 0.0 < found[0]["groups"] <= 1.0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    named = manifest["inputs"]["teachers"]["teacher_tokenizer"]
    assert named == cabochon.load(workshop.model)[1].fingerprint()
    for folder in (tmp_path / "run" / "checkpoints").glob("step-12"):
        shutil.rmtree(folder)
    assert call("resume", tmp_path / "run").code == 0


def test_a_served_teacher_of_another_tokenizer_says_the_same(
    workshop: Workshop, tmp_path: Path, other_tokenizer: Path
) -> None:
    pytest.importorskip("httpx2")
    model, tokenizer = cabochon.load(workshop.model)
    world = local_server.World(model=model, tokenizer=tokenizer)
    words = ("--tokenizer", other_tokenizer, "--cross-tokenizer", "--steps", 2, "--context", 40)
    with local_server.serving(world) as transport:
        served = ("--teacher", transport.url, "--teacher-tokenizer", workshop.model)
        done = workshop.train(*words, *served, "--out", tmp_path / "served")
        assert done.code == 0, done.err
        wrong = ("--teacher", transport.url, "--tokenizer", other_tokenizer)
        refused = workshop.train(*wrong, "--out", tmp_path / "wrong")
        assert_refused(refused, "cuts a sample of text", "--cross-tokenizer")
    done = workshop.train(*words, "--teacher", workshop.run, "--out", tmp_path / "resident")
    assert done.code == 0, done.err
    found = [each["loss"] for each in metrics(tmp_path / "served")]
    expected = [each["loss"] for each in metrics(tmp_path / "resident")]
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cross-tokenizer",), "needs a --teacher folder or server"),
        (("--teacher", "http://x", "--cross-tokenizer"), "--teacher-tokenizer FOLDER names"),
        (("--teacher", "x", "--teacher-tokenizer", "y"), "goes with --cross-tokenizer"),
    ],
)
def test_crossing_refuses_what_cannot_be(
    workshop: Workshop, tmp_path: Path, words: tuple[object, ...], said: str
) -> None:
    assert_refused(workshop.train(*words, "--out", tmp_path / "run"), said, code=2)


def test_the_doctor_says_how_much_can_be_compared(
    workshop: Workshop, other_tokenizer: Path
) -> None:
    done = call(
        "doctor", "pretrain", "--tokenizer", other_tokenizer, "--data", workshop.corpus,
        "--teacher", workshop.run, "--cross-tokenizer",
    )  # fmt: skip
    assert done.code == 0, done.out
    assert "groups cover the same bytes" in done.out
