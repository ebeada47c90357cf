"""Datasets on the disk: written, read, cut short, appended to, killed."""

import copy
import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from small_episodes import assert_same, needs, varied_episode, without

from cabochon.core.errors import ConfigError, DataError, FolderError
from cabochon.data.rlds.datasets import WindowDataset
from cabochon.data.rlds.frames import framed
from cabochon.data.rlds.reader import Episodes, validate
from cabochon.data.rlds.records import Episode, episode_of
from cabochon.data.rlds.shards import FORMATS, ShardFormat, write_shard
from cabochon.data.rlds.spec import Array, Spec
from cabochon.data.rlds.writer import EpisodeWriter

EPISODES = [varied_episode(length, seed) for seed, length in enumerate((5, 1, 9, 2, 12))]


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> ShardFormat:
    needs(request.param)
    return request.param


@pytest.fixture
def dataset(tmp_path: Path, format: ShardFormat) -> Path:
    with EpisodeWriter(tmp_path / "set", format=format, episodes_per_shard=2) as writer:
        for episode in EPISODES:
            writer.write(episode)
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        (
            "features.json",
            '"dimensions": [',
            '"dimensions": ["many", ',
            "invalid literal .* 'many'",
        ),
        ("features.json", '"featuresDict"', '"features"', "'featuresDict' is missing"),
        ("dataset_info.json", '"shardLengths": [', '"shardLengths": ["-1", ', "-1 is no number of"),
        ("dataset_info.json", '"splits": [', '"splits": [3, ', "not as TensorFlow Datasets writes"),
    ],
)
def test_files_beside_the_shards_that_say_nonsense_are_named(
    dataset: Path, file: str, old: str, new: str, words: str
) -> None:
    place = dataset / file
    text = place.read_text()
    assert old in text
    place.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=f"{file}.*{words}"):
        Episodes(dataset)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_full_disk_is_an_error_of_the_system(format: ShardFormat) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        write_shard(Path("/dev/full"), format, [b"x" * 2**20])


def simple(length: int, **metadata: object) -> Episode:
    return episode_of(
        observations=np.arange(length + 1, dtype=np.float32),
        actions=np.arange(length),
        rewards=np.ones(length, np.float32),
        terminated=True,
        metadata=metadata,
    )


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix not in {".json", ".unfinished"})


def test_what_is_written_is_read_bit_for_bit_by_number_in_order_and_in_slices(
    dataset: Path,
) -> None:
    episodes = Episodes(dataset)
    assert len(shards(dataset)) == 3
    for found, wanted in zip(episodes, EPISODES, strict=True):
        assert_same(found, wanted)
    for number in (4, 0, -1, 2):
        assert_same(episodes[number], EPISODES[number])
    for found, wanted in zip(episodes[::-2], EPISODES[::-2], strict=True):
        assert_same(found, wanted)
    assert episodes.episode_lengths().tolist() == [len(each) for each in EPISODES]
    assert list(validate(dataset)) == []


def test_splits_are_chosen_as_tensorflow_datasets_chooses_them(dataset: Path) -> None:
    with EpisodeWriter(dataset, split="test") as writer:
        writer.write(EPISODES[1])

    def lengths(split: str) -> list[int]:
        return [each.transitions for each in Episodes(dataset, split)]

    assert lengths("train[1:3]") == [1, 9]
    assert lengths("train[-2:]") == [2, 12]
    assert lengths("train[:50%]") == [5, 1]  # 2.5 rounds to the even 2
    assert lengths("train[50%:]") == [9, 2, 12]
    assert lengths("test + train[:1]") == [1, 5]
    assert lengths("train[3:1]") == []
    with pytest.raises(DataError, match="no split 'vaild'"):
        lengths("vaild")
    with pytest.raises(DataError, match="no place 6"):
        lengths("train[:6]")
    with pytest.raises(ConfigError, match="cannot be read"):
        lengths("train[1:2:3]")


def test_a_dataset_grows_without_touching_its_closed_shards(dataset: Path) -> None:
    before = {path: path.read_bytes() for path in shards(dataset)}
    with EpisodeWriter(dataset, append=True) as writer:
        writer.write(EPISODES[0])
    assert {path: path.read_bytes() for path in before} == before
    assert len(Episodes(dataset)) == 6
    assert_same(Episodes(dataset)[5], EPISODES[0])
    with pytest.raises(DataError, match="already has a split"):
        EpisodeWriter(dataset)
    with pytest.raises(DataError, match="other features"):
        EpisodeWriter(dataset, spec=Spec.of(simple(2)), append=True)
    with (
        pytest.raises(DataError, match=r"missing .*big"),
        EpisodeWriter(dataset, append=True) as w,
    ):
        w.write(simple(2))


def test_two_writers_of_one_split_do_not_meet_and_two_of_two_splits_do(tmp_path: Path) -> None:
    needs("tfrecord")
    spec = Spec.of(simple(1))
    with (
        EpisodeWriter(tmp_path, spec=spec, format="tfrecord") as one,
        EpisodeWriter(tmp_path, spec=spec, split="test") as two,
    ):
        with pytest.raises(DataError, match="another process"):
            EpisodeWriter(tmp_path, append=True)
        one.write(simple(3))
        two.write(simple(4))
    assert [len(Episodes(tmp_path, split)) for split in ("train", "test")] == [1, 1]


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_rlds_files import simple
from cabochon.data.rlds.writer import EpisodeWriter
writer = EpisodeWriter({folder!r}, format={format!r}, episodes_per_shard=3)
for length in range(1, 6):
    writer.write(simple(length))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_loses_no_episode_it_wrote(tmp_path: Path, format: ShardFormat) -> None:
    folder = tmp_path / "set"
    tests = str(Path(__file__).parent)
    code = KILLED.format(tests=tests, folder=str(folder), format=format)
    died = subprocess.run([sys.executable, "-c", code], check=False)
    assert died.returncode == -signal.SIGKILL

    closed = Episodes(folder)
    assert [each.transitions for each in closed] == [1, 2, 3]  # the closed shard is readable
    (left,) = closed.unfinished
    assert (left.split, left.episodes, left.complaint) == ("train", 2, "")
    (finding,) = validate(folder)
    assert "2 whole episodes are outside of closed shards" in finding

    journal = folder / "episodes-train.unfinished"
    journal.write_bytes(journal.read_bytes() + framed(b"half of a record")[:20])
    assert "cut short" in Episodes(folder).unfinished[0].complaint
    with EpisodeWriter(folder, append=True) as writer:
        assert writer.recovered == 2
        writer.write(simple(6))
    assert [each.transitions for each in Episodes(folder)] == [1, 2, 3, 4, 5, 6]
    assert list(validate(folder)) == []
    assert not journal.exists()


def test_a_writer_that_died_between_listing_a_shard_and_emptying_its_journal_stores_nothing_twice(
    tmp_path: Path,
) -> None:
    needs("tfrecord")
    writer = EpisodeWriter(tmp_path, format="tfrecord")
    writer.write(simple(1))
    journal = (tmp_path / "episodes-train.unfinished").read_bytes()
    writer.close()
    (tmp_path / "episodes-train.unfinished").write_bytes(journal)
    assert Episodes(tmp_path).unfinished == ()
    with EpisodeWriter(tmp_path, append=True) as again:
        assert again.recovered == 0
    assert len(Episodes(tmp_path)) == 1


def test_a_cut_or_changed_shard_is_an_error_that_names_it(dataset: Path) -> None:
    shard = shards(dataset)[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert_same(Episodes(dataset, keep_invalid=True)[0], EPISODES[0])  # the others stay readable
    with pytest.raises(DataError, match=shard.name):
        Episodes(dataset, keep_invalid=True)[2]
    assert [shard.name in finding for finding in validate(dataset)] == [True]
    middle = 300  # within the first record; the head of either format is shorter
    shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(DataError, match=f"{shard.name}.*(checksum|hash mismatch)"):
        Episodes(dataset, keep_invalid=True)[2]
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name} is missing"):
        Episodes(dataset, keep_invalid=True)[3]


def test_features_of_another_dataset_are_an_error(tmp_path: Path, dataset: Path) -> None:
    content = json.loads((dataset / "features.json").read_text())
    steps = content["featuresDict"]["features"]["steps"]["sequence"]["feature"]
    other = {"pythonClassName": "x.Tensor", "tensor": {"dtype": "int64", "encoding": "none"}}
    steps["featuresDict"]["features"]["speed"] = other
    (dataset / "features.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no steps/speed: is features\.json that of another"):
        Episodes(dataset)[0]
    steps["featuresDict"]["features"]["speed"] = {"pythonClassName": "x.Audio", "audio": {}}
    (dataset / "features.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="steps/speed is a feature Audio, which cannot be read"):
        Episodes(dataset)
    (dataset / "features.json").write_text("{}")
    with pytest.raises(DataError, match=r"not the features\.json of an RLDS dataset"):
        Episodes(dataset)
    with pytest.raises(FolderError, match="no RLDS dataset"):
        Episodes(tmp_path / "nowhere")


def test_invalid_episodes_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    needs("tfrecord")
    with EpisodeWriter(tmp_path, format="tfrecord") as writer:
        for length in (1, 2, 3):
            writer.write(simple(length, invalid=length == 2))
    assert [each.transitions for each in Episodes(tmp_path)] == [1, 3]
    assert [each.transitions for each in Episodes(tmp_path, keep_invalid=True)] == [1, 2, 3]


def test_doubles_are_kept_or_refused_never_rounded(tmp_path: Path) -> None:
    needs("tfrecord")
    episode = episode_of(
        observations=np.array([0.1, 0.2]),
        actions=np.array([0]),
        rewards=np.array([1.0], np.float32),
        terminated=False,
    )
    spec = Spec.of(episode)
    assert spec.steps["observation"] == Array(dtype="float64", encoding="bytes")
    rounding = Spec(steps={**spec.steps, "observation": Array(dtype="float64")}, metadata={})
    with (
        EpisodeWriter(tmp_path, spec=rounding, format="tfrecord") as writer,
        pytest.raises(DataError, match="does not fit into the float32"),
    ):
        writer.write(episode)


def test_a_reader_travels_to_another_process(dataset: Path) -> None:
    episodes = Episodes(dataset)
    assert_same(episodes[3], EPISODES[3])
    assert_same(copy.deepcopy(episodes)[3], EPISODES[3])


def test_forked_workers_read_beside_a_parent_that_has_read(dataset: Path) -> None:
    episodes = Episodes(dataset)
    assert_same(episodes[0], EPISODES[0])
    windows = WindowDataset(episodes, 2)
    alone = [windows[i]["action"].tolist() for i in range(len(windows))]
    loader = torch.utils.data.DataLoader(
        windows, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside other tests' threads
        found = [item["action"].tolist() for item in loader]
    assert found == alone


def test_the_specification_survives_its_file(dataset: Path) -> None:
    assert Spec.from_json(json.loads((dataset / "features.json").read_text())) == Spec.of(
        EPISODES[0]
    )


def test_a_real_dataset_of_robot_episodes_is_read_and_its_faults_are_named(
    shared_data: Path,
) -> None:
    """BridgeData, written by TensorFlow Datasets: 15 episodes, pictures, text, no is_last."""
    needs("tfrecord")
    episodes = Episodes(shared_data / "rlds_bridge", last_step_valid=True)
    assert len(episodes) == 15
    episode = episodes[3]
    observation = episode.steps["observation"]
    assert observation["image_0"].shape == (len(episode), 64, 64, 3)
    assert observation["state"].dtype == np.float32
    assert episode.steps["language_instruction"][0] == "turn lever vertical to front"
    assert episode.metadata["episode_metadata"]["episode_id"] == 3
    assert episode.transitions == len(episode)
    found = list(validate(shared_data / "rlds_bridge"))
    assert any("is_last is True nowhere" in finding for finding in found)
    assert any("last_step_valid" in finding for finding in found)


def test_real_trajectories_of_cartpole_come_back_exactly(
    shared_data: Path, tmp_path: Path, format: ShardFormat
) -> None:
    data = np.load(shared_data / "expert_rollouts" / "cartpole.npz")
    parts = [np.split(data[name], data["indices"]) for name in ("acts", "rews")]
    begin = 0
    episodes = []
    for actions, rewards, ended in zip(*parts, data["terminal"], strict=True):
        stop = begin + len(actions) + 1
        episodes.append(
            episode_of(
                observations=data["obs"][begin:stop],
                actions=actions,
                rewards=rewards,
                terminated=bool(ended),
            )
        )
        begin = stop
    with EpisodeWriter(tmp_path / "cartpole", format=format) as writer:
        for episode in episodes:
            writer.write(episode)
    read = Episodes(tmp_path / "cartpole")
    for found, wanted in zip(read, episodes, strict=True):
        assert_same(found, wanted)
    assert np.mean([each.total_reward() for each in read]) == pytest.approx(473.1, abs=0.1)
    assert list(validate(tmp_path / "cartpole")) == []


def test_tensorflow_datasets_reads_what_is_written_here(tmp_path: Path) -> None:
    """Needs that library; it cannot read a column that is empty in a dimension, not even its own.

    Of the two formats it reads tfrecord through TensorFlow alone.
    """
    tfds = pytest.importorskip(
        "tensorflow_datasets", reason="tensorflow-datasets is not installed (a large peer)"
    )
    needs("array_record")
    episodes = [without(each, "observation/none") for each in EPISODES]
    with EpisodeWriter(tmp_path / "set", episodes_per_shard=2) as writer:
        for episode in episodes:
            writer.write(episode)
    source = tfds.builder_from_directory(str(tmp_path / "set")).as_data_source("train")
    assert len(source) == len(episodes)
    for number, wanted in enumerate(episodes):
        steps = list(source[number]["steps"])
        for name in ("action", "reward", "big", "is_first", "is_last", "is_terminal"):
            assert np.array([step[name] for step in steps]).tolist() == wanted.steps[name].tolist()
        for name in ("image", "exact", "bytes", "half", "one"):
            found = np.stack([step["observation"][name] for step in steps])
            assert found.tobytes() == wanted.steps["observation"][name].tobytes()
        assert [step["text"].decode() for step in steps] == wanted.steps["text"].tolist()
        for step, row, deep in zip(steps, wanted.steps["rows"], wanted.steps["deep"], strict=True):
            assert np.asarray(step["rows"]).tolist() == row.tolist()
            assert [np.asarray(r).tolist() for r in step["deep"]] == [r.tolist() for r in deep]
        assert source[number]["episode_id"].decode() == wanted.metadata["episode_id"]
        assert source[number]["config"]["lengths"].tolist() == (
            wanted.metadata["config"]["lengths"].tolist()
        )


def test_the_example_of_the_page_on_episodes_runs() -> None:
    needs("tfrecord")
    page = Path(__file__).resolve().parents[3] / "docs" / "rlds.md"
    source = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(source, "docs/rlds.md", "exec"), {})
