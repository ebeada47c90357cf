"""kill -9 at random moments of a small run. The claim on Gemma is in tests/papers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BEGINNING = """
import os, shutil, signal, sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from lives import import_what_it_needs, kill_often, live, timed
from test_runs import Training, begin, metrics, same
from cabochon.training import Run, checkpoint, supervise
from safetensors.torch import load_file

dtype, folder = getattr(torch, sys.argv[1]), Path(sys.argv[2])


def run_at(name, updates, save_every):
    def work():
        place = folder / name
        run = Run(place) if place.exists() else begin(place)
        training = Training(dtype)
        supervise(
            run,
            lambda start: training.train(start, updates),
            training.state,
            save_every=save_every,
            keep=1,
        )

    return work


def bits(name, updates):
    path = folder / name / "checkpoints" / f"step-{{updates}}"
    checkpoint.verify(path)
    return {{
        f"{{file.name}}/{{key}}": value
        for file in sorted(path.rglob("*.safetensors"))
        for key, value in load_file(file).items()
    }}


def compare(updates):
    assert same(bits("whole", updates), bits("parts", updates)), "the weights differ"
    assert metrics(Run(folder / "whole")) == metrics(Run(folder / "parts")), "the metrics differ"
"""

AT_RANDOM = """
import_what_it_needs(run_at("first", 2, 1))
seconds = timed(run_at("whole", 24, 2))
reached, lines = [], folder / "parts" / "metrics.jsonl"
kill_often(
    run_at("parts", 24, 2),
    kills=8,
    longest=seconds / 3,
    seed=1,
    after=lambda: reached.append(sum(1 for _ in open(lines)) if lines.exists() else 0),
)
compare(24)
assert len(set(reached)) >= 2, reached
"""

AT_EVERY_FLUSH_RENAME_AND_REMOVAL = """
real = {{
    "fsync": os.fsync, "rename": Path.rename, "replace": Path.replace, "rmtree": shutil.rmtree,
}}


def dying_at(moment, work):
    def lives_until():
        calls = 0

        def counted(name):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real[name](*arguments, **options)

            return call

        os.fsync, shutil.rmtree = counted("fsync"), counted("rmtree")
        Path.rename, Path.replace = counted("rename"), counted("replace")
        work()

    return lives_until


import_what_it_needs(run_at("first", 2, 1))
_, status = os.waitpid(live(run_at("whole", 2, 1)), 0)
assert status == 0
work = run_at("parts", 2, 1)
moment, died = 0, True
while died:
    moment += 1
    shutil.rmtree(folder / "parts", ignore_errors=True)
    _, status = os.waitpid(live(dying_at(moment, work)), 0)
    died = os.WIFSIGNALED(status)
    found = checkpoint.completed(folder / "parts" / "checkpoints")
    for path in found.values():
        checkpoint.verify(path)
    lines = len(metrics(Run(folder / "parts"))) if (folder / "parts").exists() else 0
    assert lines == 0 or max(found, default=0) >= lines - 1, "a checkpoint was lost"
    _, status = os.waitpid(live(work), 0)
    assert status == 0
    compare(2)
print(moment)
assert moment > 30, "the moments were not reached"
"""


def run(program: str, dtype: str, folder: Path) -> None:
    source = (BEGINNING + program).format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", source, dtype, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_at_random_moments_a_run_ends_with_the_bits_of_the_uninterrupted_one(
    tmp_path: Path, dtype: str
) -> None:
    run(AT_RANDOM, dtype, tmp_path)


def test_killed_at_each_flush_rename_and_removal_no_checkpoint_is_lost_or_half(
    tmp_path: Path,
) -> None:
    run(AT_EVERY_FLUSH_RENAME_AND_REMOVAL, "bfloat16", tmp_path)
