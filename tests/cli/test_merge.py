"""`cabochon merge` on real folders: what it answers, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from workshop import Workshop, call

import cabochon


def moved(source: Path, place: Path, seed: int) -> Path:
    """The same model folder with other weights."""
    shutil.copytree(source, place)
    weights = load_file(place / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.items():
        weights[name] = tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.fixture
def models(workshop: Workshop, tmp_path: Path) -> list[Path]:
    """base (inside a run's checkpoint), a, b, c."""
    return [workshop.model, *(moved(workshop.model, tmp_path / n, i) for i, n in enumerate("abc"))]


def test_every_formula_writes_a_folder_that_loads_and_says_what_it_is(
    models: list[Path], tmp_path: Path
) -> None:
    base, a, b, c = models
    for name, words in {
        "average": ("average", a, b, c, "--weights", 0.5, 0.25, 0.25),
        "slerp": ("slerp", a, b, c, "--base", base, "--mean", "symmetric", "--per", "whole"),
        "ema": ("ema", a, b, c, "--decay", 0.9),
        "towards": ("towards", a, "--start", base, "--eta", 0.3),
    }.items():
        done = call("merge", *words, "--out", tmp_path / name, "--json", "--threads", 1)
        assert done.code == 0, done.err
        record = done.answer
        assert record["method"] == name
        assert record["out"] == str(tmp_path / name)
        assert set(record["blake2b"]) == {"model.safetensors"}
        _, tokenizer = cabochon.load(tmp_path / name)
        assert tokenizer.encode("import json")
        written = load_file(tmp_path / name / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in written.values())
    averaged = load_file(tmp_path / "average" / "model.safetensors")
    held = [load_file(each / "model.safetensors") for each in (a, b, c)]
    for key, tensor in averaged.items():
        exact = sum(w * h[key].double() for w, h in zip((0.5, 0.25, 0.25), held, strict=True))
        assert torch.equal(tensor, exact.to(tensor.dtype))


def test_a_run_is_its_newest_checkpoint_and_a_person_gets_two_lines(
    workshop: Workshop, models: list[Path], tmp_path: Path
) -> None:
    done = call("merge", "average", workshop.run, models[1], "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path / 'out'}\n"
    assert "sum of w_m theta_m" in done.err
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["sources"][0]["folder"] == str(workshop.model)


def test_cosines_are_a_table_for_a_person_and_numbers_for_a_program(models: list[Path]) -> None:
    base, a, b, _ = models
    found = call("merge", "cosine", a, b, "--base", base, "--json").answer["groups"]
    assert list(found)[-1] == "all"
    assert abs(found["all"]["cosines"][0][1]) < 0.05  # random directions are nearly orthogonal
    assert found["all"]["cosines"][0][0] == pytest.approx(1)
    assert (
        sum(each["elements"] for name, each in found.items() if name != "all")
        == (found["all"]["elements"])
    )
    table = call("merge", "cosine", a, b, "--base", base, "--per", "whole").out
    assert f"1: {a}" in table
    assert "cos 1,2" in table
    alone = call("merge", "cosine", a, "--base", base, "--json").answer["groups"]["all"]
    assert alone["norms"] == pytest.approx(found["all"]["norms"][:1])


def test_what_cannot_be_merged_is_refused_with_one_message(
    models: list[Path], tmp_path: Path
) -> None:
    base, a, b, _ = models
    out = ("--out", tmp_path / "out")
    for words, code, said in (
        (("average", a), 2, "needs two models or more"),
        (("slerp", a, "--base", base), 2, "needs two models or more"),
        (("average", a, a), 2, "given twice"),
        (("average", a, b, "--weights", 1, 1), 2, "--normalize"),
        (("average", a, b, "--weights", 2, -1), 2, "at least 0"),
        (("average", a, b, "--weights", "nan", 1), 2, "must be numbers"),
        (("average", a, b, "--weights", 0, 0, "--normalize"), 2, "sum to 0"),
        (("average", a, b, "--weights", 1), 2, "2 models need 2 weights"),
        (("ema", a, b, "--decay", 1.5), 2, "decay must lie in [0, 1]"),
        (("towards", a, "--start", base, "--eta", -0.1), 2, "eta must lie in [0, 1]"),
        (("towards", a, "--start", a, "--eta", 0.1), 2, "given twice"),
        (("average", a, b, "--shard-size", "big"), 2, "is no size"),
        (("average", a, b, "--threads", -1), 2, "--threads"),
        (("average", a, tmp_path / "nowhere"), 1, "no model folder or run"),
        (("slerp", a, b), 2, None),
        (("averge", a, b), 2, "did you mean 'average'"),
        ((), 2, "merge how?"),
    ):  # fmt: skip
        done = call("merge", *words, *(out if words else ()))
        assert done.code == code, (words, done.err)
        assert done.out == ""
        assert "Traceback" not in done.err
        assert said is None or said in done.err
        assert not (tmp_path / "out").exists()


def test_weights_of_another_sum_are_divided_only_on_request(
    models: list[Path], tmp_path: Path
) -> None:
    words = ("merge", "average", *models[1:3], "--weights", 3, 1, "--normalize", "--json")
    assert call(*words, "--out", tmp_path / "out").answer["weights"] == [0.75, 0.25]


def test_a_folder_in_the_way_and_an_input_as_output_are_left_alone(
    models: list[Path], tmp_path: Path
) -> None:
    _, a, b, _ = models
    before = (a / "model.safetensors").read_bytes()
    assert "one of the models" in call("merge", "average", a, b, "--out", a).err
    assert "exists already" in call("merge", "average", a, b, "--out", tmp_path).err
    assert (a / "model.safetensors").read_bytes() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A disk of 96 KiB; only root may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(place)]
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs Linux and root")
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    return place


def test_a_full_disk(models: list[Path], small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        words = ("merge", "average", *models[1:3], "--out", small_disk / "out")
        early = call(*words)
        monkeypatch.setattr("cabochon.weights.folders._check_room", lambda *_: None)
        late = call(*words)  # as when another program takes the room meanwhile
        assert list(small_disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)
    assert (early.code, late.code) == (1, 1)
    assert "its disk has 0.00 GB free" in early.err
    assert "No space left on device" in late.err
    assert "nothing is left there" in late.err


def test_a_merge_that_is_killed_leaves_no_folder_and_the_next_one_sweeps(
    models: list[Path], tmp_path: Path
) -> None:
    slow = (
        "import os, signal, sys\n"
        "from cabochon.cli import main\n"
        "from cabochon.weights import folders\n"
        "folders._check_written = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(sys.argv[1:])\n"
    )
    words = ["merge", "average", *map(str, models[1:3]), "--out", str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", slow, *words], check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".partial-out-*"))
    assert call(*words).code == 0
    assert not list(tmp_path.glob(".partial-out-*"))
    assert cabochon.load(tmp_path / "out")


def test_runs_that_began_elsewhere_are_remarked_on(workshop: Workshop, tmp_path: Path) -> None:
    """By their manifests, run before run; what lies in no run tells nothing."""
    elsewhere = moved(workshop.model, tmp_path / "elsewhere", 9)
    words = ("--steps", 1, "--checkpoint-every", 1)

    def trained(name: str, source: Path) -> Path:
        done = workshop.train(
            "--model", source, *words, "--seed", ord(name), "--out", tmp_path / name
        )
        assert done.code == 0, done.err
        return tmp_path / name

    a, c = trained("a", workshop.run), trained("c", elsewhere)
    b = trained("b", a)

    def remarks(*models: Path, how: str = "slerp", base: Path = workshop.run) -> list[str]:
        place = tmp_path / f"merge{len(list(tmp_path.iterdir()))}"
        done = call("merge", how, *models, "--base", base, "--out", place, "--json", "--threads", 1)
        assert done.code == 0, done.err
        return [each for each in done.answer["remarks"] if "did not begin" in each]

    assert remarks(a, b) == []
    (said,) = remarks(a, c)
    assert f"{c} did not begin from" in said
    assert str(elsewhere) in said
    assert remarks(b, moved(workshop.model, tmp_path / "plain", 3)) == []
    assert len(remarks(b, c, base=elsewhere)) == 1
    done = call("merge", "cosine", a, c, "--base", workshop.run, "--threads", 1)
    assert f"remark: {c} did not begin from" in " ".join(done.err.split())
    fresh = workshop.train(*words, "--out", tmp_path / "fresh")
    assert fresh.code == 0, fresh.err
    assert "it made a new model" in remarks(a, tmp_path / "fresh")[0]
