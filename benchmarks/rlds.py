"""Writing and random reading of episodes, of ours beside tensorflow-datasets and Minari.

The same 300 episodes of 200 transitions (16 floats observed, an integer action, a reward), held in
memory as arrays; each side ends with a dataset on the disk, then reads 300 episodes in a random
order and adds up their observations, which must give the same sum. Against tensorflow-datasets
both sides use array_record files (it reads no others without TensorFlow) and it reads those that
we wrote; against Minari, array_record beside its HDF5.

Run: python benchmarks/rlds.py [ROUNDS]     (about 3 minutes on two cores)
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from cabochon.data.rlds.reader import Episodes
from cabochon.data.rlds.records import Episode, episode_of
from cabochon.data.rlds.writer import EpisodeWriter
from side_by_side import compare, report, worker_arguments

EPISODES, LENGTH = 300, 200
SETTINGS = ("tfds write", "tfds read", "minari write", "minari read")


def episodes() -> list[Episode]:
    """The same in every process."""
    rng = np.random.default_rng(0)
    return [
        episode_of(
            observations=rng.normal(size=(LENGTH + 1, 16)).astype(np.float32),
            actions=rng.integers(0, 4, LENGTH),
            rewards=rng.normal(size=LENGTH).astype(np.float32),
            terminated=True,
        )
        for _ in range(EPISODES)
    ]


def ours(folder: Path, work: str, made: list[Episode], order: list[int]) -> tuple[float, float]:
    """Seconds, and the sum of what was read."""
    begin = time.perf_counter()
    with EpisodeWriter(folder) as writer:
        for each in made:
            writer.write(each)
    if work == "write":
        return time.perf_counter() - begin, 0.0
    begin = time.perf_counter()
    read = Episodes(folder)
    total = sum(float(read[i].steps["observation"].sum(dtype=np.float64)) for i in order)
    return time.perf_counter() - begin, total


def tfds(folder: Path, work: str, made: list[Episode], order: list[int]) -> tuple[float, float]:
    """With its own encoder and reader; its writer's library is array_record too."""
    import tensorflow_datasets
    from array_record.python import array_record_module

    with EpisodeWriter(folder) as writer:
        for each in made:
            writer.write(each)
    builder = tensorflow_datasets.builder_from_directory(str(folder))
    if work == "write":
        features = builder.info.features
        begin = time.perf_counter()
        records = array_record_module.ArrayRecordWriter(str(folder / "peer"), "group_size:1")
        for each in made:
            steps = [each[row] for row in range(len(each))]
            records.write(features.serialize_example(features.encode_example({"steps": steps})))
        records.close()
        return time.perf_counter() - begin, 0.0
    begin = time.perf_counter()
    source = builder.as_data_source("train")
    total = 0.0
    for i in order:
        observations = np.stack([step["observation"] for step in source[i]["steps"]])
        total += float(observations.sum(dtype=np.float64))
    return time.perf_counter() - begin, total


def minari(folder: Path, work: str, made: list[Episode], order: list[int]) -> tuple[float, float]:
    """Its HDF5 files, written at once and read by number."""
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    import minari as library
    from gymnasium.spaces import Box, Discrete
    from minari.data_collector.episode_buffer import EpisodeBuffer

    from cabochon.data.rlds.exchange import minari_fields

    fields = [minari_fields(each) for each in made]
    words: dict[str, Any] = dict.fromkeys(("author", "author_email", "code_permalink"), "x")
    begin = time.perf_counter()
    buffers = [EpisodeBuffer(id=number, **each) for number, each in enumerate(fields)]
    library.create_dataset_from_buffers(
        "episodes-v0",
        buffers,
        observation_space=Box(-np.inf, np.inf, (16,), np.float32),
        action_space=Discrete(4),
        algorithm_name="x",
        description="x",
        **words,
    )
    if work == "write":
        return time.perf_counter() - begin, 0.0
    begin = time.perf_counter()
    read = library.load_dataset("episodes-v0")
    total = sum(float(read[i].observations.sum(dtype=np.float64)) for i in order)
    return time.perf_counter() - begin, total


def work(side: str, setting: str) -> None:
    """One side of one setting, in a folder that is removed."""
    peer, what = setting.split()
    made = episodes()
    order = np.random.default_rng(1).integers(0, EPISODES, EPISODES).tolist()
    function = ours if side == "ours" else {"tfds": tfds, "minari": minari}[peer]
    with tempfile.TemporaryDirectory() as folder:
        seconds, total = function(Path(folder) / "set", what, made, order)
    wanted = sum(float(made[i].steps["observation"].sum(dtype=np.float64)) for i in order)
    assert what == "write" or abs(total - wanted) < 1e-6, (total, wanted)
    report(seconds=seconds, episodes_per_second=EPISODES / seconds)


def main() -> None:
    """Every setting; the smallest ratio is the one reported."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    results = {}
    for setting in SETTINGS:
        results[setting] = result = compare(__file__, setting, rounds=rounds, threads=1)
        print(f"{setting:13} ratio {result['ratio']} {result['ratios']}", flush=True)
    report(
        benchmark="rlds",
        ratio=min(result["ratio"] for result in results.values()),
        what=f"{EPISODES} episodes of {LENGTH} transitions: writing, and reading in random order",
        peer="tensorflow-datasets (array_record), Minari (HDF5)",
        **results,
    )


if __name__ == "__main__":
    arguments = worker_arguments()
    if arguments is None:
        main()
    else:
        work(*arguments)
