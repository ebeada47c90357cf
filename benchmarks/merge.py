"""Merging two model folders of 500 MB: `cabochon merge` against `mergekit-yaml`.

A Gemma 2 of width 1,024 with random weights and two models that moved away from it, in bfloat16 (14
layers) and float32 (6 layers), 0.5 GB each. Two formulas: the average (`linear` of the peer), and
the spherical interpolation of task vectors, one angle a tensor (`nuslerp` with a base), where three
folders are read. Whole commands are timed, from start to end, in turn; memory is the highest
resident memory of the command (this script's workers import nothing large: a child starts with its
parent's memory). The peer is spared its model card and its copy of a tokenizer.

Ours also hashes inputs and output, reads the output again, and flushes it to the disk.

Both results are compared with one computed here in float64: `deviation` is the largest difference
from it, `not_nearest` the share of the numbers that are not its rounding to the type.

Run: python benchmarks/merge.py            (about 6 minutes on two cores, 4.5 GB of disk)
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from side_by_side import compare, report, run_worker, worker_arguments

if TYPE_CHECKING:
    import torch

FOLDER = "CABOCHON_BENCHMARK_FOLDER"
LAYERS = {"bfloat16": 14, "float32": 6}
METHODS = {"average": "linear", "slerp": "nuslerp"}
"""Ours, and the peer's name for it."""


def write_models(root: Path) -> None:
    """Folders base, a and b in each type; a and b are a hundredth of the weights away from base."""
    import torch

    from cabochon.core import Key
    from cabochon.models.gemma import Gemma, preset
    from cabochon.models.gemma.convert import write_gemma

    for name, layers in LAYERS.items():
        dtype = getattr(torch, name)
        model = Gemma.init(replace(preset("gemma2-medium"), layers=layers), Key(0)).to(dtype)
        origin = {each: weight.detach().clone() for each, weight in model.named_parameters()}
        for which in ("base", "a", "b"):
            generator = Key(1).fold(which).generator()
            with torch.no_grad():
                for each, weight in model.named_parameters():
                    moved = torch.randn(weight.shape, generator=generator)
                    scale = 0.0 if which == "base" else 0.01 * origin[each].float().abs().mean()
                    weight.copy_(origin[each] + scale * moved)
            (root / name / which).mkdir(parents=True)
            write_gemma(model, root / name / which)


def command(side: str, method: str, root: Path, out: Path) -> list[str]:
    """What a user would type, with the programs of this environment."""
    a, b, base = root / "a", root / "b", root / "base"
    if side == "ours":
        words = [sys.executable, "-m", "cabochon", "merge", method, a, b, "--out", out]
        extra = ["--base", base, "--per", "tensor"] if method == "slerp" else []
        return [str(word) for word in [*words, *extra]]
    config: dict[str, object] = {
        "merge_method": METHODS[method],
        "dtype": root.name,
        "models": [{"model": str(each), "parameters": {"weight": 0.5}} for each in (a, b)],
    }
    if method == "slerp":
        config["base_model"] = str(base)
    recipe = out.with_suffix(".yml")
    recipe.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    program = Path(sys.executable).with_name("mergekit-yaml")
    quiet = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
    return [str(program), str(recipe), str(out), *quiet]


def work(side: str, setting: str) -> None:
    """One merge, as one command."""
    method, dtype = setting.split()
    root = Path(os.environ[FOLDER]) / dtype
    out = root / f"{side}-{method}"
    shutil.rmtree(out, ignore_errors=True)
    words = command(side, method, root, out)
    begin = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    report(
        seconds=seconds, processor_seconds=used.ru_utime + used.ru_stime,
        memory_mb=used.ru_maxrss / 1024,
    )  # fmt: skip


def start(side: str, _setting: str) -> None:
    """How long a command takes before it begins: its imports."""
    modules = {"ours": "cabochon.cli.merge, cabochon.weights.folders", "peer": "mergekit.merge"}
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {modules[side]}"], check=True)
    report(seconds=time.perf_counter() - begin)


def deviations(root: Path, method: str) -> dict[str, dict[str, float]]:
    """How far either result lies from the one in float64."""
    from safetensors import safe_open

    files = {
        name: safe_open(root / name / "model.safetensors", framework="pt")
        for name in ("base", "a", "b")
    }
    found = {}
    for side in ("peer", "ours"):
        paths = sorted((root / f"{side}-{method}").glob("*.safetensors"))
        merged = {}
        for path in paths:
            held = safe_open(path, framework="pt")
            merged |= dict.fromkeys(held.keys(), held)
        largest, other, count = 0.0, 0, 0
        for name, held in merged.items():
            base, a, b = (each.get_tensor(name).double() for each in files.values())
            exact = (a + b) / 2 if method == "average" else arc(base, a, b)
            result = held.get_tensor(name)
            largest = max(largest, (result.double() - exact).abs().max().item())
            other += int((result != exact.to(result.dtype)).sum())
            count += result.numel()
        found[side] = {"deviation": largest, "not_nearest": other / count}
    return found


def arc(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The middle of the arc between two task vectors, in float64."""
    import torch

    a, b = a - base, b - base
    lengths = a.norm() * b.norm()
    if lengths == 0:
        return base + (a + b) / 2
    angle = torch.acos((a * b).sum() / lengths)
    return base + torch.sin(angle / 2) / torch.sin(angle) * (a + b)


def main() -> None:
    """Both formulas in both types; of the types, the smaller ratio is the one reported."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        write_models(Path(folder))
        for dtype in LAYERS:
            for method in METHODS:
                setting = f"{method} {dtype}"
                result = results[setting] = compare(__file__, setting, rounds=rounds)
                found = deviations(Path(folder) / dtype, method)
                for side in ("peer", "ours"):
                    result[side] |= found[side]
                    print(f"{setting:16} {side}: {result[side]}")
                print(f"{setting:16} ratio {result['ratio']} {result['ratios']}", flush=True)

    def smallest(figure: str, method: str) -> float:
        return min(r[figure] for setting, r in results.items() if setting.startswith(method))

    starts = {s: run_worker(__file__, "start", s, "")["seconds"] for s in ("peer", "ours")}
    report(
        benchmark="merge",
        ratio=smallest("ratio", "average"),
        ratio_slerp=smallest("ratio", "slerp"),
        memory_ratio=smallest("memory_ratio", ""),
        what="two folders of 0.5 GB: average, and slerp of their task vectors; whole commands",
        peer="mergekit-yaml, linear and nuslerp with a base",
        seconds_before_beginning=starts,
        **results,
    )


if __name__ == "__main__":
    arguments = worker_arguments()
    if arguments is None:
        main()
    elif arguments[0] == "start":
        start(*arguments[1:])
    else:
        work(*arguments)
