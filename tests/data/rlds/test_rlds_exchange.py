"""Episodes to other forms and back."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_episodes import assert_same, varied_episode, without

from cabochon.core.errors import DataError
from cabochon.data.rlds.exchange import from_hf, from_minari, minari_fields, to_hf, to_minari
from cabochon.data.rlds.records import Ragged, episode_of

datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra hf)")


EPISODES = [without(varied_episode(n, n), "observation/none") for n in (3, 1, 5)]


def test_a_hugging_face_dataset_gives_the_same_episodes_back(tmp_path: Path) -> None:
    dataset = to_hf(EPISODES)
    assert dataset.num_rows == 3
    for found, wanted in zip(from_hf(dataset), EPISODES, strict=True):
        assert_same(found, wanted)
    dataset.save_to_disk(tmp_path / "saved")
    for found, wanted in zip(
        from_hf(datasets.load_from_disk(tmp_path / "saved")), EPISODES, strict=True
    ):
        assert_same(found, wanted)


def test_what_lists_cannot_say_is_refused() -> None:
    with pytest.raises(DataError, match="observation/none has shape"):
        to_hf([varied_episode(2)])
    with pytest.raises(DataError, match=r"episode 1 differs .* \['steps/text'\]"):
        to_hf([EPISODES[0], without(EPISODES[1], "text")])
    with pytest.raises(DataError, match="give `spec`"):
        list(from_hf(datasets.Dataset.from_dict({"a": [1]})))


@pytest.mark.parametrize("terminated", [True, False])
def test_an_episode_of_minari_is_the_same_with_its_last_step_left_out(terminated: bool) -> None:
    """Its own class holds these fields under these names."""
    episode = without(varied_episode(4, terminated=terminated), "text", "rows", "deep", "big")
    fields = minari_fields(episode)
    assert len(fields["observations"]["image"]) == 5
    assert fields["terminations"] == [False, False, False, terminated]
    assert fields["truncations"] == [False, False, False, not terminated]
    (back,) = from_minari([SimpleNamespace(id=7, **fields)])
    assert_same(replace(back, metadata={}), replace(episode, metadata={}))
    assert back.metadata == {"episode_id": "7"}


def test_discounts_that_minari_cannot_hold_are_refused() -> None:
    episode = varied_episode(3)
    half = replace(episode, steps={**episode.steps, "discount": np.full(4, 0.5, np.float32)})
    with pytest.raises(DataError, match="Minari holds no discounts"):
        minari_fields(half)
    assert isinstance(minari_fields(episode)["infos"]["rows"], Ragged)


@pytest.mark.filterwarnings("ignore::UserWarning:minari")  # on what its authors recommend
def test_minari_itself_stores_and_gives_back_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs that library (extra minari); where it is missing the comparison is skipped."""
    minari = pytest.importorskip("minari", reason="minari is not installed (extra minari)")
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed (extra rl)")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    episodes = [
        episode_of(
            observations=rng.normal(size=(length + 1, 4)).astype(np.float32),
            actions=rng.integers(0, 2, length),
            rewards=rng.normal(size=length),
            terminated=length == 4,
        )
        for length in (3, 4, 7)
    ]
    to_minari(
        episodes,
        "small-v0",
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32),
        action_space=gymnasium.spaces.Discrete(2),
        **dict.fromkeys(
            ("author", "author_email", "code_permalink", "algorithm_name", "description"), "x"
        ),
    )
    back = from_minari(minari.load_dataset("small-v0"))
    for found, wanted in zip(back, episodes, strict=True):
        assert_same(replace(found, metadata={}), wanted)
