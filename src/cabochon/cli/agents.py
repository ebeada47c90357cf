"""`train`, `resume` and `plan` of agents in environments: from settings to a run directory.

RUN/config.yaml, manifest.json, metrics.jsonl, checkpoints/   as of every run
RUN/episodes/          RLDS, with --record
RUN/evaluation.json    {"returns": [...], "lengths": [...], "actions": ..., "mean": ...}
RUN/episode.gif        a film of an episode, where there is something to see
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch.optim import Optimizer

from cabochon.cli.agent_recipe import AgentRecipe, AgentRunSettings, AgentTraining, agent_recipe_of
from cabochon.cli.configuration import build as settings_of
from cabochon.cli.configuration import dump, plain, read
from cabochon.cli.machine import device_of, use_threads
from cabochon.cli.output import answer, bytes_text, duration_text, say
from cabochon.cli.places import free
from cabochon.cli.progress import watching
from cabochon.cli.tracking import refuse_missing, trackers
from cabochon.core import Key, Step
from cabochon.core.errors import CheckpointError, ConfigError, FolderError, MissingExtra
from cabochon.files import write_whole
from cabochon.models.agents.networks import AgentNetwork, build
from cabochon.rl.agent_folder import load_into, read_acting, save_agent
from cabochon.rl.collector import Collector
from cabochon.rl.environment import Arrival, signature_of
from cabochon.rl.evaluation import film, greedy, play, save_gif
from cabochon.rl.footprint import actor_megabytes
from cabochon.rl.recording import AgentRecorder
from cabochon.runtime.memory import require_room
from cabochon.training import checkpoint
from cabochon.training.checkpoint import TrainingState
from cabochon.training.metrics import Record
from cabochon.training.optimizers import adamw
from cabochon.training.process_memory import peak_memory
from cabochon.training.run_directory import Run, create
from cabochon.training.runs import Outcome, supervise

__all__ = ["AgentSession", "begin", "go_on", "prepare", "resolved"]

Array = NDArray[Any]


@dataclass(kw_only=True)
class AgentSession:
    """Everything that a run needs, ready to make its first update."""

    recipe: AgentRecipe[Any]
    settings: Any
    network: AgentNetwork
    collector: Collector
    optimizer: Optimizer
    training: AgentTraining
    head: Mapping[str, Any]
    inputs: Mapping[str, Any]
    """What the result depends on."""
    saved: Mapping[str, Array] = field(default_factory=dict)
    """Where the environments were in the checkpoint that was read."""
    recorder: Callable[[Arrival, Array], None] | None = None

    @property
    def run(self) -> AgentRunSettings:
        """The part of the settings that all agents share."""
        settings: AgentRunSettings = self.settings.run
        return settings

    def record(
        self, run: Run, observers: Sequence[Callable[[Record], None]], *, at: int | None = None
    ) -> Outcome:
        """Makes the updates that are left, in the run directory `run`, from checkpoint `at` on."""
        with ExitStack() as stack:
            if self.run.record:
                spec = self.run.spec
                recorder = stack.enter_context(AgentRecorder(run.folder / "episodes", spec))
                self.collector.observe = recorder
            stack.enter_context(self.collector)
            return supervise(
                run,
                self._steps,
                TrainingState(
                    save_model=self._save,
                    load_model=self._load,
                    optimizer=self.optimizer,
                    extra=self.training.extra,
                ),
                save_every=self.run.checkpoint_every,
                keep=self.run.keep,
                observers=observers,
                at=at,
            )

    def _steps(self, start: int) -> Iterator[Step]:
        if self.saved:
            self.collector.restore(self.saved, start)
        return self.training.steps(self.optimizer, start)

    def _save(self, folder: Path) -> None:
        save_agent(
            folder,
            self.network,
            algorithm=self.recipe.name,
            head=self.head,
            spec=self.run.spec,
            acting=self.collector.state(),
        )

    def _load(self, folder: Path) -> None:
        load_into(self.network, folder)
        self.saved = read_acting(folder)


def begin(algorithm: str, words: Sequence[str]) -> int:
    """Begins a run and records it to its end, or to a signal."""
    recipe = agent_recipe_of(algorithm)
    invocation = read(
        recipe.settings,
        words,
        prog=f"cabochon train {algorithm}",
        description=recipe.purpose,
        names={"algorithm": algorithm},
    )
    settings = resolved(invocation.settings)
    if not settings.run.out:
        raise ConfigError("where to? --out FOLDER names the run directory, which must be new")
    folder = Path(settings.run.out)
    if (folder / "manifest.json").exists():
        raise FolderError(f"{folder} holds a run already; go on with: cabochon resume {folder}")
    free(folder)
    refuse_missing(settings.run.track)
    use_threads(settings.run.threads)
    session = prepare(recipe, settings)
    acting, runtime = settings.acting, settings.run.runtime
    require_room(acting.actors, actor_megabytes(settings.run.spec, acting, runtime))
    run = create(folder, config=dump(settings, algorithm=algorithm), inputs=session.inputs)
    return _carry_out(session, run, done=0, as_json=invocation.json)


def go_on(
    folder: Path, content: dict[str, Any], *, step: int | None = None, as_json: bool = False
) -> int:
    """Goes on with an interrupted run, whose config is `content`."""
    run = Run(folder.resolve())
    recipe = agent_recipe_of(str(content.pop("algorithm")))
    settings = settings_of(recipe.settings, content, origin=str(folder / "config.yaml"))
    saved = checkpoint.completed(run.checkpoints)
    done = max(saved, default=0) if step is None else step
    if done not in {0, *saved}:
        listing = ", ".join(map(str, saved)) or "none"
        raise CheckpointError(f"{run.folder} has no checkpoint of step {done}; it has: {listing}")
    total = int(settings.method.steps)
    use_threads(settings.run.threads)
    session = prepare(recipe, settings)
    run.refuse_changes(run.config(), session.inputs)
    for change in run.environment_changes():
        say(f"note: {change}; the last bits of the result may differ")
    if done >= total:
        checkpoint.verify(saved[done])
        say(f"{folder} is complete: all {total} updates were made")
    else:
        say(f"going on after update {done} of {total}")
        if settings.run.runtime != "inline":
            say("actors begin new episodes; only with --runtime inline do they go on with theirs")
    return _carry_out(session, run, done=done, as_json=as_json, at=step)


def resolved(settings: Any) -> Any:
    """The settings with every default that depends on this machine or folder written out."""
    run: AgentRunSettings = settings.run
    fixed = dataclasses.replace(
        run,
        out=str(Path(run.out).resolve()) if run.out else "",
        device=device_of(run.device).type if run.device == "auto" else run.device,
        threads=use_threads(run.threads),
    )
    return dataclasses.replace(settings, run=fixed)


def prepare(recipe: AgentRecipe[Any], settings: Any) -> AgentSession:
    """Builds network, collector and optimizer; opens an environment to see what it is.

    Raises:
        ConfigError: there is no such environment, or a setting does not fit another.
        MissingExtra: Gymnasium or ale-py is not installed.
    """
    run: AgentRunSettings = settings.run
    signature = signature_of(run.spec)
    key = Key(run.seed, ("agent",))
    head = recipe.head_settings(settings, signature)
    network = build(settings.network, signature, recipe.head(**head), key.fold("weights"))
    network.to(device_of(run.device))
    collector = Collector(
        network, run.spec, recipe.choose(settings), key.fold("acting"),
        acting=settings.acting, cutting=settings.method.cutting, runtime=run.runtime,
        notice=say,
    )  # fmt: skip
    return AgentSession(
        recipe=recipe,
        settings=settings,
        network=network,
        collector=collector,
        optimizer=adamw(network, settings.optimizer),
        training=recipe.train(settings, network, collector, key.fold("learning")),
        head=head,
        inputs={
            "seed": run.seed,
            "signature": dataclasses.asdict(signature),
            "gymnasium": version("gymnasium"),
            "ale_py": _version("ale-py") if run.spec.is_atari else "not used",
        },
    )


def _carry_out(
    session: AgentSession, run: Run, *, done: int, as_json: bool, at: int | None = None
) -> int:
    """Makes the updates that are left, plays, and says how it ended; the exit code."""
    total = int(session.settings.method.steps)
    steps: list[Step] = []

    def remember(record: Record) -> None:
        steps[:] = [record.step]

    begun = time.monotonic()
    with (
        redirect_stdout(sys.stderr),  # trackio speaks
        watching(
            total, session.recipe.transitions(session.settings), done=done, unit="transitions"
        ) as watcher,
        trackers(session.run.track, run.folder, plain(session.settings), start=done) as views,
    ):
        outcome = session.record(run, [watcher, remember, *views], at=at)
    complete = outcome.steps >= total
    played = _evaluate(session, run.folder) if complete else None
    report = {
        "run": str(run.folder),
        "algorithm": session.recipe.name,
        "steps": outcome.steps,
        "complete": complete,
        "stopped_by": outcome.stopped_by.name if outcome.stopped_by else None,
        "checkpoint": str(outcome.checkpoint) if outcome.checkpoint else None,
        "frames": session.collector.steps,
        "return": steps[0].report.get("return") if steps else None,
        "evaluation": played,
        "seconds": round(time.monotonic() - begun, 3),
        "peak_memory_bytes": peak_memory(),
    }
    _tell(report, total, as_json=as_json)
    if outcome.stopped_by is not None and not complete:
        return 128 + int(outcome.stopped_by)
    return 0


def _evaluate(session: AgentSession, folder: Path) -> dict[str, Any] | None:
    """Whole episodes and a film, in the run's folder; once."""
    run = session.run
    place = folder / "evaluation.json"
    if run.evaluation_episodes == 0:
        return None
    if place.is_file():
        found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        return found
    say(f"playing {run.evaluation_episodes} episodes")
    key = Key(run.seed, ("agent", "evaluation"))
    choose = session.recipe.choose(session.settings)
    choose = greedy if run.evaluation_actions == "greedy" else choose
    played = play(session.network, run.spec, run.evaluation_episodes, key, choose)
    result = {
        "returns": list(played.returns),
        "lengths": list(played.lengths),
        "mean": played.mean,
        "actions": run.evaluation_actions,
    }
    if run.video_steps:
        try:
            pictures = film(session.network, run.spec, key, choose, most=run.video_steps)
            save_gif(pictures, folder / "episode.gif")
        except (ConfigError, MissingExtra) as error:
            say(f"no film: {error}")
    write_whole(place, json.dumps(result) + "\n")
    return result


def _tell(report: dict[str, Any], total: int, *, as_json: bool) -> None:
    run = report["run"]
    if report["complete"]:
        say(
            f"done: {total} updates, {report['frames']:,} frames, in "
            f"{duration_text(report['seconds'])}, "
            f"peak memory {bytes_text(report['peak_memory_bytes'])}"
        )
        if report["evaluation"]:
            played = report["evaluation"]
            say(f"mean return of {len(played['returns'])} episodes: {played['mean']:.1f}")
    else:
        say(f"stopped by {report['stopped_by']} after {report['steps']} of {total} updates; saved")
        say(f"go on with: cabochon resume {run}")
    if as_json:
        answer(report)
    else:
        print(report["checkpoint"] or run)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
