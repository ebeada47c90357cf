"""One self-contained HTML page about a run directory or a pipeline's folder.

The page is made from files alone, so it can be made again at any time, and while a run goes on:

    RUN/config.yaml, manifest.json, metrics.jsonl   as `training.runs` writes them
    RUN/samples.jsonl                               if there: {"prompt", "text"} a line
    PIPELINE/STAGE/...                              a run directory for each training
    PIPELINE/times.json                             {"seconds": {stage: s}, "peak_memory_bytes": n}
    PIPELINE/results.json                           when all is done:

    format: 1
    pipeline: its name; title, text, repeat: what it made, of what, what to type for the same again
    seed, threads
    corpus: documents, tokens, held_out_documents, held_out_tokens, held_out_bytes, conversations
    tokenizer: entries, bytes_per_token, fingerprint
    models: [{name, parameters, of_which_embedding, width, layers, heads, kv_heads, head_width,
              ffn_width, window, context, weights}]
    stages: [{name, steps, tokens_per_step, learning_rate}]
    held_out: [{model, nats_per_token, interval: [low, high], bits_per_byte}]
    comparison: {first, second, difference (second minus first, nats per token), interval,
                 wins, documents, decided}
    tuning: {conversations, before, after, another_question (nats per token of the reference
             answers), gain and reading: comparisons}
    continuations: [{prompt, reference, and what each model wrote by its name}]
    answers: [{source, question, reference, before, after}]

    alignment: see `evaluation.alignment_page`; absent where nothing was aligned

(Those of `teacher_hacking` and `warp` are in `evaluation.hacking_page` and `alignment_page`.)

Intervals are 95%. Figures that differ from machine to machine (seconds, bytes of memory) are in
times.json and metrics.jsonl only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from cabochon.core.errors import FolderError
from cabochon.evaluation import agent_page, alignment_page, figures, hacking_page, warm_page
from cabochon.evaluation.figures import Interval, Line
from cabochon.evaluation.wording import (
    NAMES,
    count_text,
    duration_text,
    headline,
    reading_text,
    verdict,
)
from cabochon.files import write_whole
from cabochon.training.metrics import read_metrics

__all__ = ["Training", "picture", "render"]

LABELS = {"teacher": "teacher", "scratch": "from scratch", "distilled": "distilled"}
"""What they are called in pictures."""
ORDER = {"teacher": 0, "scratch": 1, "distilled": 2, "tuned": 3}
AFTERWARDS = ("judgements", "evaluation", "samples")
"""Stages that come after the trainings."""
JUDGED = "judged/"
"""What the names of such stages begin with as judge one policy each: one row for all."""
TEMPLATES = {"teacher_hacking": "hacking", "warm": "warm", "warp": "warp"}
"""Of pipelines with a page of their own."""
SMOOTHING = 0.05
"""Part of a training that each point of a smoothed curve averages over."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run directory as it is now."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]

    @property
    def seconds(self) -> float:
        """Of all updates, checkpoints left out."""
        return float(sum(each["seconds"] for each in self.metrics))

    @property
    def tokens(self) -> float:
        """Read in all, where the settings say how many an update reads; else those learned."""
        if "sequences_per_step" in self.config:
            written = sum(each["completion_tokens"] for each in self.metrics)
            return float(self.config["sequences_per_step"]) * float(written)
        if "tokens_per_step" in self.config:
            return float(self.config["tokens_per_step"]) * len(self.metrics)
        return float(sum(each["weight"] for each in self.metrics))


def render(folder: Path) -> Path:
    """The page `folder/report.html`, written from the files in `folder` alone.

    Args:
        folder: a run directory, or the folder of a pipeline, finished or not.

    Raises:
        FolderError: it is neither, or a file in it is damaged.
    """
    content = _page(folder)
    pipeline = content["results"]["pipeline"] if content["results"] else ""
    template = "agent" if "agent" in content else TEMPLATES.get(pipeline, "report")
    page = _template(template).render(content)
    path = folder / "report.html"
    write_whole(path, page)
    return path


def picture(folder: Path, path: Path) -> Path:
    """A PNG at `path` of a finished pipeline's curves beside its held-out comparison.

    Raises:
        FolderError: `folder` holds no results of a pipeline.
        MissingExtra: matplotlib is not installed.
    """
    results = _results(folder)
    if results is None:
        raise FolderError(f"{folder} holds no results.json: the pipeline has not come to its end")
    if results["pipeline"] == "teacher_hacking":
        hacking_page.picture(results, path)
        return path
    if results["pipeline"] == "warp":
        alignment_page.picture(results, path)
        return path
    comparison = results["comparison"]
    corpus = results["corpus"]
    figures.summary_png(
        path,
        _held_out_lines([_training(folder / name) for name in ("teacher", "scratch", "distilled")]),
        _held_out_intervals(results),
        _difference(comparison),
        title=headline(comparison),
        subtitle=(
            f"Same first weights, same batches; judged on {comparison['documents']} documents "
            f"({corpus['held_out_tokens']:,} tokens) that no model has read."
        ),
    )
    return path


def _page(folder: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    trainings = _trainings(folder)
    results = _results(folder)
    if not trainings:
        raise FolderError(
            f"{folder} is neither a run directory nor a pipeline's folder: it has no manifest.json"
        )
    # A run directory stands for itself; a pipeline's folder for the trainings in it.
    alone = len(trainings) == 1 and trainings[0].folder == folder
    times = _times(folder)
    page: dict[str, Any] = {
        "alone": alone,
        "title": f"Run {folder.resolve().name}",
        "results": results,
        "trainings": [_training_part(each, number) for number, each in enumerate(trainings)],
        "stages": _stages(trainings, {} if alone else times["seconds"]),
        "seconds": sum(each.seconds for each in trainings) + sum(times["seconds"].values()),
        "memory": times["peak_memory_bytes"],
        "environment": trainings[0].manifest["environment"],
        "pictures": figures.available(),
        "names": NAMES,
        "headline": None,
        "aligned": None,
        "curves": None,
        "intervals": None,
        "difference": None,
    }
    page["longest"] = max((each["seconds"] for each in page["stages"]), default=0) or 1.0
    if results is not None and results["pipeline"] == "teacher_hacking":
        page |= hacking_page.findings(results)
    elif results is not None and results["pipeline"] == "warm":
        page |= warm_page.page(results)
    elif results is not None and results["pipeline"] == "warp":
        page |= alignment_page.page(results)
    elif results is not None:
        page |= _findings(results, trainings)
    elif not alone:
        page["title"] = f"Pipeline {folder.resolve().name}, unfinished"
    elif agent_page.is_agent(trainings[0].config):
        page |= agent_page.page(folder, trainings[0].config, trainings[0].metrics)
    return page


def _findings(results: Mapping[str, Any], trainings: Sequence[Training]) -> dict[str, Any]:
    """The part of the page that only a finished pipeline has."""
    page: dict[str, Any] = {
        "title": results["title"],
        "headline": headline(results["comparison"]),
        "verdict": verdict(results["comparison"]),
        "gain": verdict(results["tuning"]["gain"]),
        "reading": reading_text(results["tuning"]["reading"]),
    }
    if results.get("alignment"):
        page |= alignment_page.findings(results["alignment"])
    if figures.available():
        page["curves"] = _curves(
            "learn",
            _held_out_lines(trainings),
            "tokens read in training",
            "held-out nats per token",
        )
        page["intervals"] = Markup(
            figures.intervals_svg(
                _held_out_intervals(results), x_label="held-out nats per token", name="held"
            )
        )
        if results["comparison"]["interval"]:
            page["difference"] = Markup(
                figures.intervals_svg(
                    [_difference(results["comparison"])],
                    x_label="difference in nats per token",
                    name="paired",
                    zero=True,
                )
            )
    return page


def _training_part(training: Training, number: int) -> dict[str, Any]:
    """A training's tables and curves."""
    chosen = _spread(training.metrics)
    columns = list(chosen[-1]) if chosen else []
    part: dict[str, Any] = {
        "name": training.name,
        "config": yaml.safe_dump(dict(training.config), sort_keys=False),
        "samples": training.samples[-5:],
        "updates": len(training.metrics),
        "created": training.manifest["created"],
        "inputs": json.dumps(training.manifest["inputs"], indent=1),
        "columns": columns,
        "rows": [[_cell(each.get(column)) for column in columns] for each in chosen],
        "loss": None,
        "held_out": None,
    }
    if training.metrics and figures.available():
        role = training.name if training.name in figures.COLOURS else "plain"
        updates = [each["step"] + 1 for each in training.metrics]
        # The loss of a policy gradient says nothing; what it got for what it wrote does.
        shown = "reward" if training.metrics[0].get("reward") is not None else "loss"
        values = [each[shown] for each in training.metrics]
        lines = [Line(label=shown, role=role, x=updates, y=_smoothed(values), faint=values)]
        unit = {"loss": "loss in training, nats per token", "reward": "reward in training"}[shown]
        part["loss"] = _curves(f"t{number}", lines, "updates", unit)
        if held_out := _measured(training, "held_out"):
            x, y = zip(*held_out, strict=True)
            measured = [Line(label="held-out", role=role, x=x, y=y)]
            part["held_out"] = _curves(
                f"h{number}", measured, "tokens learned in training", "held-out nats per token"
            )
    return part


def _curves(name: str, lines: Sequence[Line], x_label: str, y_label: str) -> Markup | None:
    drawn = [line for line in lines if line.x]
    if not drawn:
        return None
    return Markup(figures.curves_svg(drawn, x_label=x_label, y_label=y_label, name=name))


def _stages(trainings: Sequence[Training], others: Mapping[str, float]) -> list[dict[str, Any]]:
    """The rows of the table of times."""
    judged = sum(seconds for name, seconds in others.items() if name.startswith(JUDGED))
    others = {name: each for name, each in others.items() if not name.startswith(JUDGED)}
    others |= {"judgements": judged} if judged else {}
    rows = [
        {
            "name": name,
            "time": duration_text(seconds),
            "seconds": seconds,
            "updates": "",
            "tokens": "",
            "speed": "",
        }
        for name, seconds in others.items()
    ]
    learned = [
        {
            "name": NAMES.get(each.name, each.name),
            "time": duration_text(each.seconds),
            "seconds": each.seconds,
            "updates": f"{len(each.metrics):,}",
            "tokens": count_text(each.tokens),
            "speed": f"{each.tokens / each.seconds:,.0f}" if each.seconds else "",
        }
        for each in trainings
    ]
    before = [row for row in rows if row["name"] not in AFTERWARDS]
    return [*before, *learned, *(row for row in rows if row["name"] in AFTERWARDS)]


def _spread(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """About a dozen updates, evenly spread, the last among them."""
    every = max(1, len(metrics) // 12)
    return list(metrics[::-1][::every][::-1])


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _held_out_lines(trainings: Sequence[Training]) -> list[Line]:
    lines = []
    for training in trainings:
        if training.name in ("teacher", "scratch", "distilled"):
            points = _measured(training, "held_out")
            lines.append(
                Line(
                    label=LABELS[training.name],
                    role=training.name,
                    x=[x for x, _ in points],
                    y=[y for _, y in points],
                )
            )
    return lines


def _measured(training: Training, name: str) -> list[tuple[float, float]]:
    """(tokens learned so far, value) wherever an update reports `name`."""
    learned = accumulate(each["weight"] for each in training.metrics)
    return [
        (tokens, each[name])
        for tokens, each in zip(learned, training.metrics, strict=True)
        if each.get(name) is not None
    ]


def _held_out_intervals(results: Mapping[str, Any]) -> list[Interval]:
    rows = []
    for each in results["held_out"]:
        value = each["nats_per_token"]
        low, high = each["interval"] or (value, value)
        name = each["model"]
        rows.append(Interval(label=LABELS[name], role=name, value=value, low=low, high=high))
    return rows


def _difference(comparison: Mapping[str, Any]) -> Interval:
    value = comparison["difference"]
    low, high = comparison["interval"] or (value, value)
    return Interval(
        label="distilled\nminus scratch", role="distilled", value=value, low=low, high=high
    )


def _smoothed(values: Sequence[float | None]) -> list[float]:
    """Means over a window that ends at each point and is `SMOOTHING` of the whole long."""
    known = [float("nan") if value is None else value for value in values]
    width = max(1, round(SMOOTHING * len(known)))
    return [
        sum(known[max(0, end - width) : end]) / len(known[max(0, end - width) : end])
        for end in range(1, len(known) + 1)
    ]


def _trainings(folder: Path) -> list[Training]:
    """The run directory itself, or those in it, in the order in which they were begun."""
    found = [
        _training(path.parent)
        for path in sorted(folder.glob("*/manifest.json"))
        if (path.parent / "metrics.jsonl").is_file()
    ]
    if found:
        return sorted(found, key=lambda each: (each.manifest["created"], ORDER.get(each.name, 9)))
    return [_training(folder)] if (folder / "manifest.json").is_file() else []


def _training(folder: Path) -> Training:
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        metrics = list(read_metrics(folder / "metrics.jsonl"))
        samples = _lines(folder / "samples.jsonl")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FolderError(f"{folder} is no run directory that can be read: {error}") from error
    return Training(
        name=folder.resolve().name,
        folder=folder,
        config=config,
        manifest=manifest,
        metrics=metrics,
        samples=samples,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _results(folder: Path) -> dict[str, Any] | None:
    path = folder / "results.json"
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise FolderError(
            f"{path} is damaged ({error}); remove it and run the pipeline again"
        ) from error


def _times(folder: Path) -> dict[str, Any]:
    path = folder / "times.json"
    if not path.is_file():
        return {"seconds": {}, "peak_memory_bytes": 0}
    return dict(json.loads(path.read_text("utf-8")))


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = count_text
    return environment.get_template(f"{name}.html.jinja")
