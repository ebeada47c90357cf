from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cabochon.core import Loss
from cabochon.core.errors import CheckpointError
from cabochon.training import (
    OptimizerConfig,
    TrainingState,
    adamw,
    checkpoint,
    finish,
    fit,
    float32_weights,
)


class Trainee:
    """A small model with its optimizer, average and the functions that save and load it."""

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 8) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1)).to(dtype)
        self.optimizer = adamw(self.model, OptimizerConfig(learning_rate=1e-2))
        self.average = {n: w.clone() for n, w in float32_weights(self.model).items()}
        self.state = TrainingState(
            save_model=self.save, load_model=self.load, optimizer=self.optimizer, ema=self.average
        )

    def save(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text('{"width": 8}\n')

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_file(folder / "model.safetensors"))

    def learn(self, updates: int) -> None:
        generator = torch.Generator().manual_seed(1)

        def squares(model: nn.Module, x: torch.Tensor) -> Loss:
            error = model(x.to(model[0].weight.dtype)).float() - x.sum(1, keepdim=True)
            return Loss(total=error.square().sum(), weight=torch.tensor(len(x)))

        batches = [torch.randn(8, 4, generator=generator) for _ in range(updates)]
        finish(fit(self.model, squares, batches, self.optimizer))
        for name, weight in float32_weights(self.model).items():
            self.average[name].lerp_(weight, 0.1)

    def everything(self) -> dict[str, torch.Tensor]:
        found = {f"model.{name}": p for name, p in self.model.state_dict().items()}
        found |= {f"master.{name}": p for name, p in float32_weights(self.model).items()}
        found |= {f"ema.{name}": p for name, p in self.average.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
        return {name: tensor.clone() for name, tensor in found.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files_of(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_restores_every_bit_and_training_goes_on_as_if_nothing_had_been(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    first, second = Trainee(dtype), Trainee(dtype)
    first.learn(5)
    path = checkpoint.write(tmp_path, 5, first.state)
    assert path == tmp_path / "step-5"
    second.learn(2)
    assert not same(first.everything(), second.everything())
    assert checkpoint.read(path, second.state) == 5
    assert same(first.everything(), second.everything())
    first.learn(3)
    second.learn(3)
    assert same(first.everything(), second.everything())


def test_a_checkpoint_is_safetensors_and_json_alone(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 1, Trainee().state)
    assert files_of(path) == [
        "checksums.json",
        "ema.safetensors",
        "model/config.json",
        "model/model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_a_changed_byte_anywhere_in_any_file_is_found_and_the_file_named(tmp_path: Path) -> None:
    trainee = Trainee()
    trainee.learn(1)
    path = checkpoint.write(tmp_path, 1, trainee.state)
    checkpoint.verify(path)
    for name in files_of(path):
        file = path / name
        content = file.read_bytes()
        # Every byte of the checksums themselves, where a blank for a tab is a change too.
        places = range(len(content)) if name == "checksums.json" else (0, len(content) // 2, -1)
        for place in places:
            for flip in (0x01, 0x29):  # 0x29 turns a blank into a tab
                changed = bytearray(content)
                changed[place] ^= flip
                file.write_bytes(changed)
                with pytest.raises(CheckpointError, match=f"{name} was changed"):
                    checkpoint.verify(path)
        file.write_bytes(content)
    checkpoint.verify(path)


def test_missing_and_surplus_files_are_named(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 1, Trainee().state)
    for name in files_of(path):
        content = (path / name).read_bytes()
        (path / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            checkpoint.verify(path)
        (path / name).write_bytes(content)
    (path / "model" / "extra.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model/extra\.safetensors does not belong"):
        checkpoint.verify(path)


def test_checksums_that_are_another_json_are_found(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 1, Trainee().state)
    for content in ("[]", "{}", '{"files": 3}', '{"files": {}}', ""):
        (path / "checksums.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"checksums\.json was changed"):
            checkpoint.verify(path)


def test_a_damaged_newest_checkpoint_is_an_error_that_suggests_the_newest_whole_one(
    tmp_path: Path,
) -> None:
    trainee = Trainee()
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, step, trainee.state)
    for step in (2, 3):
        (tmp_path / f"step-{step}" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-3.*state\.json was changed.*step-1: resume"):
        checkpoint.read_newest(tmp_path, trainee.state)
    (tmp_path / "step-1" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="begin the run again"):
        checkpoint.read_newest(tmp_path, trainee.state)


def test_without_checkpoints_a_run_begins_at_0(tmp_path: Path) -> None:
    assert checkpoint.read_newest(tmp_path / "absent", Trainee().state) == 0


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    trainee = Trainee()
    for step in (9, 100, 20):
        checkpoint.write(tmp_path, step, trainee.state)
    assert list(checkpoint.completed(tmp_path)) == [9, 20, 100]


def test_pruning_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    trainee = Trainee()
    for step in range(1, 10):
        checkpoint.write(tmp_path, step, trainee.state)
    checkpoint.prune(tmp_path, keep=2, keep_every=4)
    assert list(checkpoint.completed(tmp_path)) == [4, 8, 9]
    checkpoint.prune(tmp_path, keep=1)
    assert list(checkpoint.completed(tmp_path)) == [9]
    assert [p.name for p in tmp_path.iterdir()] == ["step-9"]


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    trainee = Trainee()
    path = checkpoint.write(tmp_path, 1, trainee.state)
    (path / "state.json").write_text("{}")
    trainee.learn(1)
    checkpoint.write(tmp_path, 1, trainee.state)
    checkpoint.verify(path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_leftovers_of_a_killed_write_are_cleaned_and_nothing_else(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 1, Trainee().state)
    for leftover in (".partial-step-2-abcd", ".discarded-step-0"):
        (tmp_path / leftover / "model").mkdir(parents=True)
        (tmp_path / leftover / "model" / "x").write_text("half")
    (tmp_path / ".notes").write_text("mine")
    assert list(checkpoint.completed(tmp_path)) == [1]
    checkpoint.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".notes", "step-1"]


def test_every_file_is_on_the_disk_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traces the real calls: what is flushed, and when the checkpoint becomes visible."""
    events: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return real_replace(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file a descriptor belongs to")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    path = checkpoint.write(tmp_path, 1, Trainee().state)
    at = events.index("rename")
    partial = Path(events[at - 1])
    flushed = {Path(event) for event in events[:at]}
    assert {partial / name for name in files_of(path)} | {partial, partial / "model"} <= flushed
    assert events[at + 1 :] == [str(tmp_path)]


FULL_DISK = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_checkpoint import Trainee
from cabochon.core.errors import CheckpointError
from cabochon.training import checkpoint

folder = Path({folder!r})
trainee = Trainee(width=2000)
trainee.learn(1)
checkpoint.write(folder, 1, trainee.state)
try:
    for step in range(2, 100):
        {obstacle}
        checkpoint.write(folder, step, trainee.state)
except CheckpointError as error:
    print(error)
assert list(checkpoint.completed(folder)) == list(range(1, step)), "earlier checkpoints"
for path in checkpoint.completed(folder).values():
    checkpoint.verify(path)
assert [p for p in folder.iterdir() if p.name.startswith(".")] == [], "leftovers"
"""


def run_with_obstacle(folder: Path, obstacle: str) -> str:
    script = FULL_DISK.format(
        tests=str(Path(__file__).parent), folder=str(folder), obstacle=obstacle
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_that_grows_too_large_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    message = run_with_obstacle(
        tmp_path, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    )
    assert f"could not write checkpoint {tmp_path / 'step-2'}" in message
    assert os.strerror(errno.EFBIG) in message
    assert "earlier checkpoints are intact (step-1)" in message


def test_a_full_disk_leaves_the_earlier_checkpoints_and_no_half_one(tmp_path: Path) -> None:
    """On a real file system of one megabyte, where the system lets us have one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a small file system")
    try:
        message = run_with_obstacle(tmp_path / "checkpoints", "pass")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert os.strerror(errno.ENOSPC) in message
    assert "MiB are free there; earlier checkpoints are intact (step-1" in message


def test_an_error_of_the_model_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    trainee = Trainee()

    def fails(folder: Path) -> None:
        trainee.save(folder)
        raise ZeroDivisionError

    state = TrainingState(save_model=fails, load_model=trainee.load, optimizer=trainee.optimizer)
    with pytest.raises(ZeroDivisionError):
        checkpoint.write(tmp_path, 1, state)
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_another_model_precision_or_average_is_refused(tmp_path: Path) -> None:
    trainee = Trainee()
    trainee.learn(1)
    path = checkpoint.write(tmp_path, 1, trainee.state)

    def with_(other: Trainee, **changes: object) -> TrainingState:
        values = {**vars(other.state), "load_model": lambda _: None, **changes}
        return TrainingState(**values)

    with pytest.raises(CheckpointError, match="precision"):
        checkpoint.read(path, with_(Trainee(torch.bfloat16)))
    with pytest.raises(CheckpointError, match="moving average differ"):
        checkpoint.read(path, with_(trainee, ema={}))
    one = nn.Sequential(nn.Linear(4, 8))
    with pytest.raises(CheckpointError, match=r"2\.weight"):
        checkpoint.read(path, with_(trainee, optimizer=adamw(one, OptimizerConfig())))


def test_any_torch_optimizer_can_be_saved_with_or_without_names(tmp_path: Path) -> None:
    """SGD's momentum may be None, RMSprop and Adagrad keep other tensors, ASGD plain numbers."""
    makers = (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.ASGD)
    for i, make in enumerate(makers):
        for named in (False, True):
            found = []
            for updates in (4, 2):
                trainee = Trainee()
                parameters = (
                    trainee.model.named_parameters() if named else trainee.model.parameters()
                )
                trainee.optimizer = make(parameters, lr=0.01)
                trainee.learn(updates)
                state = TrainingState(
                    save_model=trainee.save, load_model=trainee.load, optimizer=trainee.optimizer
                )
                found.append((trainee, state))
            path = checkpoint.write(tmp_path / f"{i}{named}", 4, found[0][1])
            checkpoint.read(path, found[1][1])
            for trainee, _ in found:
                trainee.learn(2)
            assert torch.equal(found[0][0].model[0].weight, found[1][0].model[0].weight)


def test_settings_of_the_optimizer_come_back_exactly(tmp_path: Path) -> None:
    first, second = Trainee(), Trainee()
    first.optimizer.param_groups[0].update(lr=0.1 + 0.2, initial_lr=1 / 3)
    path = checkpoint.write(tmp_path, 1, first.state)
    checkpoint.read(path, second.state)
    group = second.optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"]) == (0.1 + 0.2, 1 / 3)
    assert group["betas"] == (0.9, 0.95)
    settings = json.loads((path / "state.json").read_text())
    assert settings["step"] == 1
