"""The page is complete, self-contained and claims no more than its figures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cabochon.core import Step
from cabochon.core.errors import FolderError, MissingExtra
from cabochon.evaluation import figures, report
from cabochon.evaluation.wording import headline, reading_text, verdict
from cabochon.training.metrics import MetricsFile, Record
from cabochon.training.run_directory import create

VOID = {"meta", "br", "use", "path", "link", "img"}


class Elements(HTMLParser):
    """Checks that elements close in order, and collects tags, attributes and visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def read(page: Path) -> Elements:
    elements = Elements()
    elements.feed(page.read_text("utf-8"))
    assert elements.open == []
    return elements


def begin_run(folder: Path, updates: int, **more: float) -> Path:
    run = create(folder, config=f"stage: {folder.name}\nsteps: {updates}\n", inputs={"seed": 0})
    metrics = MetricsFile(run.metrics, start=0)
    for index in range(updates):
        step = Step(
            index=index,
            loss=7.0 - index / updates,
            grad_norm=1.0,
            weight=512.0,
            learning_rate=1e-3,
            report={"held_out": 7.0 - index / updates} if index % 5 == 4 else more,
        )
        metrics.append(Record(step=step, seconds=0.125))
    metrics.close()
    return folder


def comparison(difference: float, low: float, high: float, **names: str) -> dict[str, Any]:
    return {
        "first": names.get("first", "scratch"),
        "second": names.get("second", "distilled"),
        "difference": difference,
        "interval": [low, high],
        "wins": 40,
        "documents": 53,
        "decided": not low <= 0.0 <= high,
    }


def results(**changes: Any) -> dict[str, Any]:
    size = {"layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "head_width": 32, "ffn_width": 128}
    return {
        "format": 1,
        "pipeline": "demo",
        "title": "A small family",
        "text": "some text",
        "repeat": "cabochon demo --seed 7",
        "seed": 7,
        "threads": 1,
        "corpus": {
            "documents": 50,
            "tokens": 10_000,
            "held_out_documents": 53,
            "held_out_tokens": 4_000,
            "held_out_bytes": 12_000,
            "conversations": 99,
        },
        "tokenizer": {"entries": 2048, "bytes_per_token": 3.0, "fingerprint": "ab"},
        "models": [
            {
                "name": name,
                "parameters": 100_000,
                "of_which_embedding": 40_000,
                **size,
                "window": 64,
                "context": 256,
                "weights": {"model.safetensors": "cd"},
            }
            for name in ("teacher", "scratch", "distilled", "tuned")
        ],
        "stages": [
            {"name": name, "steps": 20, "tokens_per_step": 512, "learning_rate": 1e-3}
            for name in ("teacher", "scratch", "distilled", "tuned")
        ],
        "held_out": [
            {
                "model": name,
                "nats_per_token": value,
                "interval": [value - 0.1, value + 0.1],
                "bits_per_byte": value / 2,
            }
            for name, value in (("teacher", 4.0), ("scratch", 4.5), ("distilled", 4.3))
        ],
        "comparison": comparison(-0.2, -0.25, -0.15),
        "tuning": {
            "conversations": 20,
            "before": 5.0,
            "after": 3.0,
            "another_question": 3.1,
            "gain": comparison(-2.0, -2.2, -1.8, first="before", second="after"),
            "reading": comparison(-0.1, -0.2, -0.05, first="another_question", second="after"),
        },
        "continuations": [
            {
                "prompt": "def f(",
                "reference": "x):",
                "teacher": "self",
                "scratch": "a",
                "distilled": "<script>alert(1)</script>",
            }
        ],
        "answers": [
            {
                "source": "a.jsonl:1",
                "question": "What does\n\ndef f(): ...",
                "reference": "Nothing.",
                "before": "   ",
                "after": "Return & go.",
            }
        ],
        **changes,
    }


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "family"
    for name in ("teacher", "scratch", "distilled", "tuned"):
        begin_run(folder / name, 20)
    (folder / "results.json").write_text(json.dumps(results()))
    times = {"seconds": {"tokenizer": 2.0, "evaluation": 1.0}, "peak_memory_bytes": 2**30}
    (folder / "times.json").write_text(json.dumps(times))
    return folder


def test_the_page_needs_nothing_but_itself(pipeline: Path) -> None:
    page = report.render(pipeline)
    elements = read(page)
    assert page == pipeline / "report.html"
    assert {"script", "link", "img", "iframe"}.isdisjoint(elements.tags)
    assert "svg" in elements.tags
    names = {"src", "href", "xlink:href", "style"}
    refers = [value or "" for name, value in elements.attributes if name in names]
    assert not [value for value in refers if "//" in value]
    assert "@import" not in page.read_text("utf-8")


def test_ids_are_unique_and_every_reference_inside_the_page_finds_one(pipeline: Path) -> None:
    text = report.render(pipeline).read_text("utf-8")
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    refers = re.findall(r'xlink:href="#([^"]*)"', text) + re.findall(r"url\(#([^)]*)\)", text)
    assert refers
    assert set(refers) <= set(ids)


def test_what_a_model_wrote_is_shown_as_text_and_not_obeyed(pipeline: Path) -> None:
    text = report.render(pipeline).read_text("utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "Return &amp; go." in text


def test_the_page_says_what_was_found_and_how_to_do_it_again(pipeline: Path) -> None:
    text = " ".join(read(report.render(pipeline)).text.split())
    for said in (
        verdict(results()["comparison"]),
        "cabochon demo --seed 7",
        "Seed 7",
        "4.300",
        "2,048",
        "from scratch",
        "peak memory",
        "4,096",  # tokens a second: 512 in 0.125 s
    ):
        assert said in text


def test_colours_follow_the_page_so_that_pictures_are_readable_in_the_dark(pipeline: Path) -> None:
    text = report.render(pipeline).read_text("utf-8")
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(pictures) >= 3
    for each in pictures:
        # Black is what a path without any stroke or fill of its own would have.
        assert set(re.findall(r"#[0-9a-f]{6}", each)) <= {"#000000"}
        assert "var(--ink)" in each or "var(--muted)" in each


def test_without_matplotlib_the_page_is_complete_and_says_how_to_get_pictures(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)
    elements = read(report.render(pipeline))
    assert "svg" not in elements.tags
    assert "pip install 'cabochon[report]'" in elements.text
    assert "4.300" in elements.text
    with pytest.raises(MissingExtra, match=r"cabochon\[report\]"):
        report.picture(pipeline, pipeline / "picture.png")


def test_the_same_files_give_the_same_page(pipeline: Path) -> None:
    first = report.render(pipeline).read_bytes()
    assert report.render(pipeline).read_bytes() == first


def test_a_pipeline_that_has_not_come_to_its_end_shows_what_there_is(tmp_path: Path) -> None:
    begin_run(tmp_path / "family" / "teacher", 7)
    create(tmp_path / "family" / "scratch", config="stage: scratch\n", inputs={})
    text = read(report.render(tmp_path / "family")).text
    assert "unfinished" in text
    assert "No update has been made yet" in text


def test_a_single_run_is_reported_with_its_samples_and_reports(tmp_path: Path) -> None:
    folder = begin_run(tmp_path / "run", 40, kl=0.5)
    lines = [{"prompt": "once", "text": f" upon {number}"} for number in range(9)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    text = read(report.render(folder)).text
    assert "once upon 8" in text
    assert "once upon 3" not in text
    assert "stage: run" in text


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"neither a run directory"):
        report.render(tmp_path)
    with pytest.raises(FolderError, match=r"results\.json"):
        report.picture(tmp_path, tmp_path / "picture.png")


def test_damaged_results_are_named(pipeline: Path) -> None:
    (pipeline / "results.json").write_text('{"format": 1')
    with pytest.raises(FolderError, match=r"results\.json is damaged"):
        report.render(pipeline)


def test_the_picture_is_a_png_for_a_readme(pipeline: Path) -> None:
    path = report.picture(pipeline, pipeline / "images" / "demo.png")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width = int.from_bytes(content[16:20], "big")
    assert width > 1200


def test_a_decided_comparison_is_told_with_its_interval() -> None:
    told = verdict(comparison(-0.2, -0.25, -0.15))
    assert "better" in told
    assert "0.200 nats per token (95% interval 0.150 to 0.250)" in told
    assert "40 of 53" in told


def test_an_interval_that_holds_zero_is_no_victory() -> None:
    undecided = comparison(-0.01, -0.03, 0.01)
    assert "does not show a difference" in verdict(undecided)
    assert "No difference shown" in headline(undecided)
    assert "better" not in verdict(undecided)
    assert "does not show" in reading_text(undecided)


def test_a_defeat_is_told_as_one() -> None:
    lost = comparison(0.1, 0.05, 0.15)
    assert "worse" in verdict(lost)
    assert "worse" in headline(lost)
    assert "less likely" in reading_text(lost)


def test_a_single_document_proves_nothing() -> None:
    alone = {**comparison(-0.2, 0, 0), "interval": None, "decided": False}
    assert "tells nothing of others" in verdict(alone)


def test_names_at_the_ends_of_lines_that_meet_do_not_touch() -> None:
    lines = [
        figures.Line(label=name, role=name, x=[0, 1], y=[5.0, 4.0])
        for name in ("teacher", "scratch", "distilled")
    ]
    picture = figures.curves_svg(lines, x_label="x", y_label="y", name="t")
    heights = []
    for line in lines:
        found = re.search(
            rf'<text[^>]*(?:y="([\d.]+)"|translate\([\d.]+ ([\d.]+)\))[^>]*>{line.label}<', picture
        )
        assert found is not None
        heights.append(float(found[1] or found[2]))
    heights.sort()
    assert min(b - a for a, b in pairwise(heights)) > 9.0
