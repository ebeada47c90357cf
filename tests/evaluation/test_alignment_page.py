"""The page of aligned policies says what its intervals allow, and draws what it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cabochon.evaluation import figures
from cabochon.evaluation.alignment_page import findings, gain_text, page, picture


def gain(low: float, high: float, **more: Any) -> dict[str, Any]:
    return {
        "of": "parses",
        "before": 0.3,
        "after": 0.3 + (low + high) / 2,
        "difference": {"mean": (low + high) / 2, "interval": [low, high]},
        "kl": {"mean": 4.2, "interval": [4.0, 4.4]},
        "preference": {"prompts": 9},
        **more,
    }


def policy(name: str, role: str, kl: float, reward: float) -> dict[str, Any]:
    return {
        "name": name,
        "role": role,
        "reward": {"mean": reward, "interval": [reward - 0.1, reward + 0.1]},
        "kl": {"mean": kl, "interval": None},
        "parts": {},
    }


ALIGNED = {
    "policies": [policy("start", "start", -1e-7, 0.2), policy("member_1", "member", 2.0, 0.5)],
    "fronts": [
        {
            "label": "WARP",
            "role": "warp",
            "points": [{"kl": -1e-7, "reward": 0.2}, {"kl": 2.1, "reward": 0.6}],
        }
    ],
    "gain": gain(0.1, 0.3),
}


def test_policies_that_have_not_moved_are_drawn(tmp_path: Path) -> None:
    """All KLs are 0, or below it by rounding; warnings are errors here."""
    pytest.importorskip("matplotlib")
    for kl in (0.0, -1e-7):
        points = [{"kl": kl, "reward": 0.2}, {"kl": kl, "reward": 0.3}]
        still = {"policies": [policy("start", "start", kl, 0.2), policy("m", "member", kl, 0.3)],
                 "fronts": [{"label": "WARP", "role": "warp", "points": points}]}  # fmt: skip
        picture({"alignment": {**ALIGNED, **still}}, tmp_path / "front.png")


def test_a_gain_is_told_with_its_interval_and_its_price() -> None:
    assert gain_text(gain(0.1, 0.3)) == (
        "On held-out prompts parses rose from 0.300 to 0.500 (+0.200, 95% interval +0.100 to "
        "+0.300), at a KL of 4.20 nats per completion from where it began."
    )
    assert "parses fell from" in gain_text(gain(-0.3, -0.1))


def test_what_the_interval_does_not_show_is_not_claimed() -> None:
    assert "does not show that parses changed" in gain_text(gain(-0.1, 0.3))
    alone = gain(0.0, 0.2, difference={"mean": 0.1, "interval": None})
    assert "one tells nothing of others" in gain_text(alone)


def test_the_page_has_the_front_and_the_policies_beside_it() -> None:
    pytest.importorskip("matplotlib")
    found = findings(ALIGNED)
    for label in ("WARP", "member 1"):
        assert label in found["fronts"]
    assert "start" in found["parts"]
    assert page({"title": "x", "alignment": ALIGNED})["headline"] == "The reward rose"


def test_without_matplotlib_the_page_has_its_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)
    found = findings(ALIGNED)
    assert found["fronts"] is None
    assert found["aligned_gain"]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture({"alignment": ALIGNED}, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
