"""`data inspect` of episodes: counts, findings, text of rollouts, a filmstrip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from workshop import Workshop, call

import cabochon
from cabochon.core.types import Completion, Group
from cabochon.data.rlds.records import episode_of
from cabochon.data.rlds.rollouts import Rollout, open_rollouts, write_rollouts
from cabochon.data.rlds.writer import EpisodeWriter

pytest.importorskip("google_crc32c", reason="google-crc32c is not installed (extra rlds)")


def pictures(folder: Path) -> Path:
    with EpisodeWriter(folder, format="tfrecord", name="game") as writer:
        for length in (3, 5):
            shades = np.linspace(0, 255, length + 1).astype(np.uint8)
            screen = np.broadcast_to(shades[:, None, None, None], (length + 1, 12, 10, 3)).copy()
            writer.write(
                episode_of(
                    observations={"screen": screen},
                    actions=np.arange(length),
                    rewards=np.full(length, 2.0),
                    terminated=length == 3,
                    metadata={"episode_id": f"game {length}"},
                )
            )
    return folder


def test_episodes_are_counted_and_one_is_shown(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "game" / "1.0.0")
    answer = call("data", "inspect", folder.parent, "--json", "--index", 1).answer
    assert (answer["name"], answer["format"], answer["episodes"]) == ("game", "tfrecord", 2)
    assert answer["transitions"] == 8
    assert answer["return"] == {"least": 6.0, "mean": 8.0, "most": 10.0}
    assert (answer["terminated"], answer["findings"]) == (1, 0)
    assert answer["features"]["steps/observation/screen"] == "Image (12, 10, 3)"
    assert answer["sample"]["metadata"] == {"episode_id": "game 5"}
    assert answer["sample"]["ended"] == "cut short"
    shown = call("data", "inspect", folder)
    assert "2 episodes in 1 shards" in shown.out
    assert "step 0: observation/screen uint8 (12, 10, 3), action 0, reward 2.0" in shown.out
    beyond = call("data", "inspect", folder, "--split", "train[:50%]", "--index", 1)
    assert beyond.code == 1
    assert "there is no 1" in beyond.err


def test_a_filmstrip_shows_the_first_and_the_last_picture(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed (extra rlds)")
    folder, strip = pictures(tmp_path / "game"), tmp_path / "strip.png"
    done = call("data", "inspect", folder, "--filmstrip", strip)
    assert done.code == 0
    assert str(strip) in done.err
    found = np.array(image.open(strip))
    assert found.shape == (96, 4 * 80 + 3 * 4, 3)
    assert [int(found[0, at, 0]) for at in (0, -1)] == [0, 255]


def test_a_damaged_dataset_is_described_as_far_as_it_can_be(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "game")
    shard = folder / "game-train.tfrecord-00000"
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(bytes(content))
    answer = call("data", "inspect", folder, "--json").answer
    assert answer["findings"] == 1
    assert "wrong checksum of the record" in answer["first_findings"][0]
    asked = call("data", "inspect", folder, "--index", 1)
    assert asked.code == 1
    assert "wrong checksum" in asked.err


def test_the_text_of_rollouts_is_shown_through_their_tokenizer(
    workshop: Workshop, tmp_path: Path
) -> None:
    tokenizer = cabochon.load(workshop.model)[1]
    prompt, answer = tokenizer.encode("def f(x):\n"), tokenizer.encode("    return x\n")
    completion = Completion(
        tokens=torch.tensor(answer),
        logprob=torch.full((len(answer),), -0.5),
        model_logprob=torch.full((len(answer),), -0.5),
        stopped=True,
    )
    rollout = Rollout(
        number=0,
        group=Group(prompt=torch.tensor(prompt), completions=(completion,)),
        versions=(torch.full((len(answer),), 3),),
        rewards=torch.tensor([0.25]),
        parts={"length": torch.tensor([0.25])},
    )
    folder = tmp_path / "rollouts"
    with open_rollouts(folder, tokenizer=tokenizer.fingerprint(), format="tfrecord") as writer:
        write_rollouts(writer, [rollout])
    words = ("--tokenizer", workshop.tokenizer)
    sample = call("data", "inspect", folder, *words, "--json").answer["sample"]
    assert sample["prompt_text"] == "def f(x):\n"
    assert sample["completion_text"] == "    return x\n"
    assert (sample["return"], sample["weights_versions"]) == (0.25, [3])
    assert sample["metadata"]["reward_parts"] == {"length": 0.25}
    assert sample["logprob"] == pytest.approx(-0.5 * len(answer))
    shown = call("data", "inspect", folder, *words)
    assert "[" in shown.out.split("---")[1]
    other = tmp_path / "other"
    data = ("--data", workshop.corpus, "--vocab-size", 300, "--out", other)
    assert call("data", "tokenizer", *data).code == 0
    wrong = call("data", "inspect", folder, "--tokenizer", other)
    assert wrong.code == 1
    assert "the rollouts are of the tokenizer" in wrong.err
