from __future__ import annotations

import json
import math
import resource
import signal
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cabochon.core import Key, Loss, Step
from cabochon.core.errors import (
    CheckpointError,
    ConfigError,
    FolderError,
    NonFinite,
    RunChanged,
)
from cabochon.training import (
    OptimizerConfig,
    Outcome,
    Record,
    Run,
    TrainingState,
    adamw,
    cosine,
    create,
    fit,
    float32_weights,
    supervise,
)
from cabochon.training.metrics import MetricsFile, read_metrics
from cabochon.weights.ema import ema

CONFIG = "steps: 12\nlearning_rate: 0.01\n"
INPUTS = {"seed": 0, "data": {"train.jsonl": "ab12"}, "weights": {"shards": ["1", "2"]}}
TIMES = ("seconds", "units_per_second")


class Training:
    """One process's life: a fresh model, optimizer and average, as after a start of the program."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
        self.optimizer = adamw(self.model, OptimizerConfig(learning_rate=1e-2))
        self.average = {name: w.clone() for name, w in float32_weights(self.model).items()}
        self.state = TrainingState(
            save_model=self.save, load_model=self.load, optimizer=self.optimizer, ema=self.average
        )
        self.starts: list[int] = []

    def save(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.model.state_dict(), folder / "model.safetensors")

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_file(folder / "model.safetensors"))

    def batches(self, start: int) -> Iterator[Tensor]:
        while True:
            yield torch.randn(8, 4, generator=Key(7).fold("batch", start).generator())
            start += 1

    def objective(self, model: nn.Module, x: Tensor) -> Loss:
        error = model(x.to(model[0].weight.dtype)).float() - x.sum(1, keepdim=True)
        return Loss(
            total=error.square().sum(),
            weight=torch.tensor(len(x)),
            report={"absolute": error.detach().abs().sum()},
        )

    def train(self, start: int, total: int = 12) -> Iterator[Step]:
        self.starts.append(start)
        steps = fit(
            self.model,
            self.objective,
            self.batches(2 * start),
            self.optimizer,
            accumulate=2,
            schedule=cosine(total=12, warmup=3),
            start=start,
        )
        for step in islice(steps, total - start):
            ema(self.average, float32_weights(self.model), 0.9, out=self.average)
            yield step

    def everything(self) -> dict[str, Tensor]:
        found = {f"model.{name}": p for name, p in self.model.state_dict().items()}
        found |= {f"master.{name}": p for name, p in float32_weights(self.model).items()}
        found |= {f"ema.{name}": p for name, p in self.average.items()}
        return {name: tensor.clone() for name, tensor in found.items()}


def begin(folder: Path) -> Run:
    return create(folder, config=CONFIG, inputs=INPUTS)


def go(run: Run, training: Training | None = None, **options: Any) -> Outcome:
    training = training or Training()
    return supervise(run, training.train, training.state, **{"save_every": 5, **options})


def metrics(run: Run) -> list[dict[str, Any]]:
    lines = list(read_metrics(run.metrics))
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def saved(run: Run) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def interrupt_at(index: int, number: signal.Signals, times: int = 1):
    def observe(record: Record) -> None:
        if record.step.index == index:
            for _ in range(times):
                signal.raise_signal(number)

    return observe


def test_a_run_directory_holds_config_manifest_metrics_and_checkpoints(tmp_path: Path) -> None:
    run = begin(tmp_path / "deep" / "run")
    outcome = go(run)
    assert outcome == Outcome(steps=12, stopped_by=None, checkpoint=run.checkpoints / "step-12")
    assert sorted(p.name for p in run.folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "lock",
        "manifest.json",
        "metrics.jsonl",
    ]
    assert run.config() == CONFIG
    manifest = run.manifest()
    assert manifest["inputs"] == INPUTS
    assert manifest["environment"]["torch"] == torch.__version__
    assert saved(run) == ["step-10", "step-12"]
    lines = list(read_metrics(run.metrics))
    assert [line["step"] for line in lines] == list(range(12))
    assert set(lines[0]) == {
        "step",
        "loss",
        "grad_norm",
        "weight",
        "learning_rate",
        "absolute",
        *TIMES,
    }


def test_an_existing_folder_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    with pytest.raises(FolderError, match="exists already; resume"):
        begin(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FolderError, match="exists already"):
        begin(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert begin(tmp_path / "empty").config() == CONFIG


def test_a_creation_that_was_killed_leaves_no_run_and_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".partial-run-abcd" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / ".partial-run-abcd" / "run" / "config.yaml").write_text("half")
    with pytest.raises(FolderError, match=r"not a run directory: it has no config\.yaml"):
        Run(tmp_path / "run")
    begin(tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="could not make the run directory"):
        begin(tmp_path / "file" / "run")


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    (run.folder / "manifest.json").write_text("{")
    with pytest.raises(FolderError, match=r"manifest\.json is damaged"):
        run.manifest()


def test_the_same_config_and_inputs_are_no_change(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.refuse_changes(CONFIG, INPUTS)
    run.refuse_changes(CONFIG, {**INPUTS, "weights": {"shards": ("1", "2")}})
    assert run.environment_changes() == []


def test_every_difference_is_shown_key_by_key(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    changed = {"seed": 1, "data": {"train.jsonl": "ab12", "more.jsonl": "cd"}}
    with pytest.raises(RunChanged) as caught:
        run.refuse_changes("steps: 12\nlearning_rate: 0.02\n", changed)
    assert str(caught.value).splitlines()[1:-1] == [
        "  -learning_rate: 0.01",
        "  +learning_rate: 0.02",
        "  data.more.jsonl: was absent, is cd",
        "  seed: was 0, is 1",
        "  weights.shards: was ['1', '2'], is absent",
    ]


def test_a_config_edited_in_the_run_directory_is_a_change(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    (run.folder / "config.yaml").write_text(CONFIG.replace("12", "13"))
    with pytest.raises(RunChanged, match=r"\+steps: 13"):
        run.refuse_changes(run.config(), INPUTS)


def test_another_number_of_threads_is_an_environment_change(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    torch.set_num_threads(2)
    try:
        assert run.environment_changes() == ["threads: was 1, is 2"]
    finally:
        torch.set_num_threads(1)


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    with run.locked(), pytest.raises(FolderError, match=r"is being written by process \d+ on"):
        go(run)
    assert go(run).steps == 12


def test_a_run_that_cannot_be_locked_is_a_clear_error(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    (run.folder / "lock").mkdir()
    with pytest.raises(FolderError, match="could not lock"):
        go(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_then_stops_and_the_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, dtype: torch.dtype, number: signal.Signals
) -> None:
    whole, first, second = Training(dtype), Training(dtype), Training(dtype)
    reference, run = begin(tmp_path / "whole"), begin(tmp_path / "parts")
    go(reference, whole)
    handler = signal.getsignal(number)
    outcome = go(run, first, observers=[interrupt_at(6, number)])
    assert outcome == Outcome(steps=7, stopped_by=number, checkpoint=run.checkpoints / "step-7")
    assert signal.getsignal(number) is handler
    assert go(run, second).stopped_by is None
    assert second.starts == [7]
    assert same(whole.everything(), second.everything())
    assert metrics(run) == metrics(reference)


def test_a_second_sigint_stops_at_once_and_the_checkpoint_before_is_whole(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        go(run, observers=[interrupt_at(6, signal.SIGINT, times=2)])
    assert signal.getsignal(signal.SIGINT) is handler
    assert saved(run) == ["step-5"]
    assert len(metrics(run)) == 7
    training = Training()
    go(run, training)
    assert training.starts == [5]
    assert [line["step"] for line in metrics(run)] == list(range(12))


def test_in_another_thread_signals_are_left_alone(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(go(run)))
    thread.start()
    thread.join()
    assert outcomes[0].steps == 12


def test_an_error_in_training_keeps_the_last_checkpoint_and_resumes_from_it(tmp_path: Path) -> None:
    whole, second = Training(), Training()
    reference, run = begin(tmp_path / "whole"), begin(tmp_path / "parts")
    go(reference, whole)

    def breaks(record: Record) -> None:
        if record.step.index == 8:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        go(run, observers=[breaks])
    assert len(metrics(run)) == 9
    with run.metrics.open("a") as file:
        file.write('{"step": 9, "lo')  # torn by a kill
    go(run, second)
    assert second.starts == [5]
    assert same(whole.everything(), second.everything())
    assert metrics(run) == metrics(reference)


def test_a_non_finite_loss_keeps_the_last_good_checkpoint_and_names_it(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    training = Training()

    def objective(model: nn.Module, x: Tensor) -> Loss:
        loss = Training.objective(training, model, x)
        poison = math.nan if len(list(read_metrics(run.metrics))) == 7 else 0.0
        return Loss(total=loss.total + poison, weight=loss.weight)

    training.objective = objective  # type: ignore[method-assign]
    with pytest.raises(NonFinite, match=r"update 7: .*micro-batch 0 .*last good .*step-5"):
        go(run, training)
    assert saved(run) == ["step-5"]
    assert len(metrics(run)) == 7


def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    first, second = Training(), Training()
    go(run, first)
    before = run.metrics.read_bytes()
    outcome = go(run, second)
    assert outcome == Outcome(steps=12, stopped_by=None, checkpoint=run.checkpoints / "step-12")
    assert run.metrics.read_bytes() == before
    assert same(first.everything(), second.everything())


def test_checkpoints_are_pruned_only_after_the_next_is_there(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    seen: list[list[str]] = []
    go(run, save_every=2, keep=1, keep_every=6, observers=[lambda _: seen.append(saved(run))])
    assert saved(run) == ["step-12", "step-6"]
    assert all(names for names in seen[2:])
    assert seen[-1] == ["step-10", "step-6"]


def test_a_damaged_newest_checkpoint_stops_the_resumption_until_one_chooses_an_earlier(
    tmp_path: Path,
) -> None:
    whole, again = Training(), Training()
    run = begin(tmp_path / "run")
    go(run, whole)
    reference = metrics(run)
    damaged = run.checkpoints / "step-12" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-12 .*optimizer\.safetensors .*step-10"):
        go(run)
    with pytest.raises(CheckpointError, match="no checkpoint of step 11; it has: 10, 12"):
        go(run, at=11)
    assert go(run, again, at=10).steps == 12
    assert again.starts == [10]
    assert same(whole.everything(), again.everything())
    assert metrics(run) == reference


def test_going_back_to_an_earlier_checkpoint_removes_the_later_ones(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    go(run, keep=9)
    go(run, at=5, observers=[interrupt_at(6, signal.SIGTERM)])
    assert saved(run) == ["step-5", "step-7"]
    assert len(metrics(run)) == 7


def test_observers_see_every_update_with_its_time(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    seen: list[Record] = []
    go(run, observers=[seen.append])
    assert [record.step.index for record in seen] == list(range(12))
    assert all(record.seconds > 0 for record in seen)
    assert all(r.units_per_second == r.step.weight / r.seconds for r in seen)
    assert [r.as_json()["loss"] for r in seen] == [line["loss"] for line in metrics(run)]


@pytest.mark.parametrize("wrong", [{"save_every": 0}, {"keep": 0}, {"keep_every": -1}])
def test_intervals_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="save_every"):
        go(begin(tmp_path / "run"), **wrong)


def step(index: int, **report: float) -> Record:
    return Record(
        step=Step(
            index=index, loss=1.0, grad_norm=2.0, weight=3.0, learning_rate=4.0, report=report
        ),
        seconds=0.5,
    )


def test_metrics_are_json_whatever_the_report_holds(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", start=0)
    file.append(step(0, kl=math.nan, reward=-math.inf, loss=99.0))
    file.close()
    (line,) = (json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["kl"] is None
    assert line["reward"] is None
    assert line["loss"] == 1.0
    assert line["units_per_second"] == 6.0


def test_a_line_that_is_no_record_is_named_and_not_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnot a record\n{"step": 2}\n')
    with pytest.raises(FolderError, match="not a record"):
        MetricsFile(path, start=2)
    assert path.read_text().count("\n") == 3


def test_a_full_disk_under_the_metrics_is_a_clear_error(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", start=0)
    file.append(step(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (tmp_path / "metrics.jsonl").stat().st_size + 20  # for a part of the second line
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(FolderError, match="the checkpoints are intact"):
            file.append(step(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.close()
    again = MetricsFile(tmp_path / "metrics.jsonl", start=1)
    again.append(step(1))
    again.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
