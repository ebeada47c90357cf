"""Merges from disk to disk: equal to those in memory, checked, recorded, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cabochon.core.errors import ConfigError, FolderError, NonFinite, WeightsMismatch
from cabochon.core.errors import TokenizerMismatch as OtherTokenizer
from cabochon.weights import formulas, interpolate, stream
from cabochon.weights.folders import merge, task_vectors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 11,
          "hidden_size": 6, "num_hidden_layers": 2, "dtype": "float32"}  # fmt: skip
BPE = {"type": "BPE", "vocab": {c: i for i, c in enumerate("abcdefghij")}, "merges": []}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 10, "content": "<eos>"}],
    "normalizer": None,
    "model": BPE,
}
NAMES = {
    "model.embed_tokens.weight": (11, 6), "model.layers.0.mlp.weight": (6, 6),
    "model.layers.0.norm.weight": (6,), "model.layers.1.mlp.weight": (6, 6),
    "model.layers.1.norm.weight": (6,), "model.norm.weight": (6,), "scale": (),
}  # fmt: skip


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.Generator().manual_seed(99)
    return {
        name: (
            torch.randn(shape, generator=base)
            + 0.1 * seed * torch.randn(shape, generator=generator)
        ).to(dtype)
        for name, shape in NAMES.items()
    }


def folder(place: Path, held: dict[str, Tensor], shards: int = 1, **config: Any) -> Path:
    """A model folder with the files that a published one has."""
    place.mkdir()
    names = sorted(held)
    if shards == 1:
        save_file(held, place / "model.safetensors", metadata={"format": "pt"})
    else:
        where = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({name: held[name] for name in names[i::shards]}, place / file)
            where |= dict.fromkeys(names[i::shards], file)
        index = {"metadata": {}, "weight_map": where}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
    (place / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (place / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    (place / "chat_template.jinja").write_text("{{ messages }}")
    return place


def read(place: Path) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    for path in sorted(place.glob("*.safetensors")):
        held |= load_file(path)
    return held


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """base, a, b: the last in three files."""
    return [
        folder(tmp_path / "base", tensors(0)),
        folder(tmp_path / "a", tensors(1)),
        folder(tmp_path / "b", tensors(2), shards=3),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workers", [1, 3])
def test_from_disk_is_what_it_is_in_memory_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, workers: int
) -> None:
    held = [tensors(seed, dtype) for seed in range(4)]
    base, *models = [folder(tmp_path / str(i), each, 1 + i % 3) for i, each in enumerate(held)]
    start, *rest = held
    weights = [0.5, 0.2, 0.3]
    cases: list[tuple[formulas.Formula, Path | None, dict[str, Tensor]]] = [
        (formulas.averaged(3), None, interpolate.average(rest)),
        (formulas.averaged(3, weights), None, interpolate.average(rest, weights)),
    ]
    for per in ("tensor", "block", "whole"):
        for mean in ("recursion", "symmetric"):
            arc = interpolate.slerp(start, rest, weights, per=per, mean=mean)
            cases.append((formulas.slerp(3, weights, per=per, mean=mean), base, arc))
    for number, (formula, origin, expected) in enumerate(cases):
        out = tmp_path / f"out{number}"
        merge(formula, models, out, base=origin, workers=workers)
        assert same(read(out), expected), formula
    merge(formulas.towards(0.3), models[:1], tmp_path / "t", base=base, workers=workers)
    assert same(read(tmp_path / "t"), interpolate.towards(start, rest[0], 0.3))


def test_the_moving_average_is_that_of_its_recursion(tmp_path: Path) -> None:
    from cabochon.weights.ema import ema

    held = [tensors(seed) for seed in range(4)]
    paths = [folder(tmp_path / str(i), each) for i, each in enumerate(held)]
    average: Any = held[0]
    for each in held[1:]:
        average = ema(average, each, 0.9)
    merge(formulas.ema(4, 0.9), paths, tmp_path / "out")
    for name, tensor in read(tmp_path / "out").items():
        torch.testing.assert_close(tensor, average[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_are_the_models_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    held = [tensors(seed, dtype) for seed in range(3)]
    held[1]["scale"] = torch.tensor(-0.0, dtype=dtype)
    held[1]["model.norm.weight"][0] = torch.finfo(dtype).smallest_normal / 4  # subnormal
    base, a, b = [folder(tmp_path / str(i), each) for i, each in enumerate(held)]
    for name, formula, models, expected in (
        ("t0", formulas.slerp(2, [1.0, 0.0]), [a, b], held[1]),
        ("t1", formulas.slerp(2, [0.0, 1.0], mean="symmetric"), [a, b], held[2]),
        ("e1", formulas.towards(1.0), [a], held[1]),
        ("e0", formulas.towards(0.0), [a], held[0]),
    ):
        merge(formula, models, tmp_path / name, base=base)
        written = read(tmp_path / name)
        assert same(written, expected)
        assert math.copysign(1, written["scale"].item()) == math.copysign(
            1, expected["scale"].item()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_number_of_sixteen_bits_survives_and_rounds_to_even(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """All 65,536 patterns but NaN and infinities, averaged with their reverse order."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    kind = dtype if dtype != torch.float32 else torch.bfloat16
    a = bits.view(kind)
    a = torch.where(a.isfinite(), a, torch.zeros_like(a)) * (0.5 if kind == torch.float16 else 1)
    a, b = a.to(dtype), a.flip(0).to(dtype)
    paths = [folder(tmp_path / name, {"w": each}) for name, each in (("a", a), ("b", b))]
    merge(formulas.averaged(2, [0.3, 0.7]), paths, tmp_path / "out")
    exact = (0.3 * a.double() + 0.7 * b.double()).to(dtype)
    assert torch.equal(read(tmp_path / "out")["w"], exact)


@pytest.mark.parametrize("name", ["float32", "bf16", "fp16"])
def test_another_type_may_be_asked_for_and_mixed_types_then_meet(tmp_path: Path, name: str) -> None:
    a = folder(tmp_path / "a", tensors(1, torch.bfloat16), dtype="bfloat16")
    b = folder(tmp_path / "b", tensors(2, torch.float32))
    with pytest.raises(WeightsMismatch, match=r"BF16 in .* and F32 in .*--dtype"):
        merge(formulas.averaged(2), [a, b], tmp_path / "out")
    merge(formulas.averaged(2), [a, b], tmp_path / "out", dtype=name)  # type: ignore[arg-type]
    kind = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    exact = {
        n: ((t.double() + tensors(2)[n].double()) / 2).to(kind)
        for n, t in tensors(1, torch.bfloat16).items()
    }
    assert same(read(tmp_path / "out"), exact)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert written == str(kind).removeprefix("torch.")


def test_large_outputs_are_cut_into_files_that_readers_know(
    three: list[Path], tmp_path: Path
) -> None:
    _, a, b = three
    merge(formulas.averaged(2), [a, b], tmp_path / "whole")
    merge(formulas.averaged(2), [a, b], tmp_path / "cut", shard_bytes=300)
    assert same(read(tmp_path / "whole"), read(tmp_path / "cut"))
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(0).values())


def test_the_record_says_what_was_done_and_the_hashes_are_right(
    three: list[Path], tmp_path: Path
) -> None:
    base, a, b = three
    out = tmp_path / "out"
    record = merge(formulas.slerp(2, [0.25, 0.75]), [a, b], out, base=base, shard_bytes=400)
    assert json.loads((out / "merge.json").read_text()) == json.loads(json.dumps(record))
    assert record["method"] == "slerp"
    assert record["weights"] == [0.25, 0.75]
    assert "sin((1 - t) Om)" in record["formula"]
    assert [source["role"] for source in record["sources"]] == ["model", "model", "base"]
    for place, hashes in [
        *((Path(each["folder"]), each["blake2b"]) for each in record["sources"]),
        (out, record["blake2b"]),
    ]:
        files = {path.name: path.read_bytes() for path in place.glob("*.safetensors")}
        assert hashes == {name: hashlib.blake2b(b).hexdigest() for name, b in files.items()}
    block = record["angles"]["model.layers.1"]
    assert len(block["coefficients"]) == 2
    assert block["cosines"][0][1] == pytest.approx(
        task_vectors(base, [a, b])[0]["model.layers.1"].cosines[0, 1]
    )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (a / name).read_bytes()


def test_the_same_merge_gives_the_same_bytes(three: list[Path], tmp_path: Path) -> None:
    base, a, b = three
    for name, workers in (("one", 1), ("two", 4)):
        merge(formulas.slerp(2), [a, b], tmp_path / name, base=base, workers=workers)
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert one == two


def test_an_embedding_that_is_stored_twice_counts_once(tmp_path: Path) -> None:
    def tied(seed: int, head: bool) -> dict[str, Tensor]:
        held = tensors(seed)
        copy = {"lm_head.weight": held["model.embed_tokens.weight"].clone()} if head else {}
        return {**held, **copy}

    results = []
    for head in (False, True):
        paths = [folder(tmp_path / f"{head}{s}", tied(s, head)) for s in range(3)]
        out = tmp_path / f"out{head}"
        record = merge(formulas.slerp(2, per="whole"), paths[1:], out, base=paths[0])
        results.append(read(out))
        assert bool(record["stored_twice"]) is head
        found, _ = task_vectors(paths[0], paths[1:], "whole")
        assert found["all"].elements == sum(t.numel() for t in tensors(0).values())
    head = results[1].pop("lm_head.weight")
    assert torch.equal(head, results[1]["model.embed_tokens.weight"])
    assert same(*results)


def test_tensors_longer_than_a_span_are_put_together_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SLICE", 7)
    monkeypatch.setattr(stream, "SPAN", 21)
    monkeypatch.setattr(stream, "READ", 13)
    held = [tensors(seed, torch.bfloat16) for seed in range(3)]
    for each in held:
        each["steps"] = torch.arange(50)
    paths = [folder(tmp_path / str(i), each) for i, each in enumerate(held)]
    merge(formulas.slerp(2), paths[1:], tmp_path / "out", base=paths[0], workers=3)
    assert same(read(tmp_path / "out"), interpolate.slerp(held[0], held[1:]))


def test_memory_is_that_of_slices_not_of_tensors(tmp_path: Path) -> None:
    """24 MB a folder, in one tensor; what is held at any time stays below a third of one."""
    for i in range(3):
        folder(tmp_path / str(i), {"w": torch.full((6_000_000,), 1.0 + i)})
    paths = [tmp_path / str(i) for i in range(3)]
    tracemalloc.start()
    merge(formulas.slerp(2, per="whole"), paths[1:], tmp_path / "out", base=paths[0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6


def change(place: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    held = read(place)
    edit(held)
    save_file(held, place / "model.safetensors")


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda a: change(a, lambda h: h.pop("scale")), WeightsMismatch, "only .* has scale"),
        (lambda a: change(a, lambda h: h.update(more=h["scale"] + 1)), WeightsMismatch, "has more"),
        (
            lambda a: change(a, lambda h: h.update({"scale": torch.zeros(2)})), WeightsMismatch,
            r"scale has shape \[2\] in .* and \[\]",
        ),
        (lambda a: rewrite(a / "config.json", model_type="gemma2"), WeightsMismatch, "model_type"),
        (lambda a: rewrite(a / "config.json", vocab_size=12), WeightsMismatch, "vocab_size is 12"),
        (
            lambda a: rewrite(a / "tokenizer.json", added_tokens=[{"id": 9, "content": "j"}]),
            OtherTokenizer, "'<eos>' is absent against 10",
        ),
        (
            lambda a: rewrite(a / "tokenizer.json", model={**BPE, "merges": ["a b"]}),
            OtherTokenizer, "merge them differently",
        ),
        (
            lambda a: change(a, lambda h: h["scale"].fill_(math.nan)), NonFinite,
            "scale holds NaN",
        ),
        (
            lambda a: change(a, lambda h: h["model.norm.weight"].fill_(math.inf)), NonFinite,
            "model.norm.weight holds NaN or an infinity",
        ),
        (lambda a: (a / "model.safetensors").write_bytes(b"x" * 90), FolderError, "cannot be read"),
        (lambda a: (a / "config.json").unlink(), FolderError, "config.json does not exist"),
        (lambda a: shutil.rmtree(a), FolderError, "is no folder"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_merged_are_refused_and_leave_nothing(
    three: list[Path], tmp_path: Path, damage: Callable[[Path], object], error: type, says: str
) -> None:
    base, a, b = three
    damage(a)
    before = sorted(path.name for path in tmp_path.iterdir())
    for formula, models, origin in (
        (formulas.averaged(2), [a, b], None), (formulas.slerp(2), [a, b], base),
    ):  # fmt: skip
        with pytest.raises(error, match=says):
            merge(formula, models, tmp_path / "out", base=origin)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_quantised_and_unequal_whole_numbers_are_refused(tmp_path: Path) -> None:
    quantised = {**tensors(0), "q": torch.zeros(4).to(torch.float8_e4m3fn)}
    paths = [folder(tmp_path / name, quantised) for name in "ab"]
    with pytest.raises(WeightsMismatch, match="quantised"):
        merge(formulas.averaged(2), paths, tmp_path / "out")
    paths = [
        folder(tmp_path / f"i{i}", {**tensors(0), "ids": torch.tensor([0, i])}) for i in (1, 2)
    ]
    with pytest.raises(WeightsMismatch, match=r"ids, of type I64, differs"):
        merge(formulas.averaged(2), paths, tmp_path / "out")


def test_folders_without_a_floating_point_tensor_are_refused(tmp_path: Path) -> None:
    counter = {"count": torch.tensor([3])}
    places = [folder(tmp_path / name, counter) for name in ("base", "a", "b")]
    with pytest.raises(WeightsMismatch, match="no floating-point tensor"):
        merge(formulas.slerp(2), places[1:], tmp_path / "out", base=places[0])
    with pytest.raises(WeightsMismatch, match="no floating-point tensor"):
        task_vectors(places[0], places[1:])


def test_a_folder_is_not_merged_with_or_onto_itself(three: list[Path], tmp_path: Path) -> None:
    base, a, b = three
    link = tmp_path / "link"
    link.symlink_to(a)
    with pytest.raises(ConfigError, match="given twice"):
        merge(formulas.averaged(2), [a, link], tmp_path / "out")
    with pytest.raises(ConfigError, match="given twice"):
        merge(formulas.slerp(2), [a, b], tmp_path / "out", base=a)
    for place in (a, link, base):
        with pytest.raises(FolderError, match="one of the models"):
            merge(formulas.slerp(2), [a, b], place, base=base)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(FolderError, match="exists already"):
        merge(formulas.averaged(2), [a, b], taken)
    assert same(read(a), tensors(1))


def test_differences_without_consequence_are_named(three: list[Path], tmp_path: Path) -> None:
    _, a, b = three
    rewrite(b / "config.json", eos_token_id=[1, 7], attention_dropout=0.1, transformers_version="9")
    rewrite(a / "config.json", eos_token_id=1)
    rewrite(b / "tokenizer.json", normalizer={"type": "NFC"})
    (b / "chat_template.jinja").write_text("other")
    remarks = "\n".join(merge(formulas.averaged(2), [a, b], tmp_path / "out")["remarks"])
    for part in ("eos_token_id is 1", "attention_dropout = 0.1", "normalizer", "chat_template"):
        assert part in remarks
    assert "transformers_version" not in remarks


def test_a_disk_without_room_is_seen_before_work_begins(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 100))
    with pytest.raises(FolderError, match=r"could not be written: the merge takes .* GB free"):
        merge(formulas.averaged(2), three[1:], tmp_path / "out")
    assert not (tmp_path / "out").exists()


LIMITED = """
import resource, sys
from pathlib import Path
from cabochon.weights import formulas
from cabochon.weights.folders import merge
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))  # writing on fails as a full disk does
a, b, out = map(Path, sys.argv[1:])
try:
    merge(formulas.averaged(2), [a, b], out, workers=2)
except OSError as error:
    print(error)
"""


def test_a_disk_that_fills_is_said_and_leaves_nothing(three: list[Path], tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, three[1:]), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "could not be written" in done.stdout
    assert "nothing is left there" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_bytes_that_changed_on_their_way_to_the_disk_are_found(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = stream._write_all

    def faulty(file: int, data: bytes | memoryview, at: int) -> None:
        changed = bytearray(data)
        changed[0] ^= 1 if at else 0
        write(file, bytes(changed), at)

    monkeypatch.setattr(stream, "_write_all", faulty)
    with pytest.raises(FolderError, match="read again, is not what was written"):
        merge(formulas.averaged(2), three[1:], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_llama_that_transformers_saved_in_pieces_is_merged_and_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    paths, states = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        paths.append(tmp_path / str(seed))
        states.append({n: t.clone() for n, t in model.state_dict().items()})
        model.save_pretrained(paths[-1], max_shard_size=1000 * (seed + 3))
    merge(formulas.slerp(2), paths[1:], tmp_path / "out", base=paths[0], shard_bytes=4000)
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert same(dict(merged), interpolate.slerp(states[0], states[1:]))


PEER = Path(sys.executable).with_name("mergekit-yaml")


@pytest.mark.skipif(not PEER.is_file(), reason="mergekit is not installed (make bench installs it)")
@pytest.mark.parametrize("method", ["linear", "nuslerp"])
def test_mergekit_comes_to_the_same(tmp_path: Path, method: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    base, a, b = paths = [tmp_path / name for name in ("base", "a", "b")]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for path in paths:
        model.save_pretrained(path)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.01 * torch.randn_like(weight))
    recipe = {
        "merge_method": method, "dtype": "float32",
        "models": [
            {"model": str(a), "parameters": {"weight": 0.7}},
            {"model": str(b), "parameters": {"weight": 0.3}},
        ],
        **({"base_model": str(base)} if method == "nuslerp" else {}),
    }  # fmt: skip
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    subprocess.run(
        [str(PEER), str(tmp_path / "recipe.yml"), str(tmp_path / "peer"), "--no-copy-tokenizer"],
        check=True, capture_output=True,
    )  # fmt: skip
    if method == "linear":
        merge(formulas.averaged(2, [0.7, 0.3]), [a, b], tmp_path / "ours")
    else:
        formula = formulas.slerp(2, [0.7, 0.3], per="tensor")
        merge(formula, [a, b], tmp_path / "ours", base=base)
    theirs, ours = read(tmp_path / "peer"), read(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=5e-7)


def test_headers_are_aligned_and_named_for_torch(three: list[Path], tmp_path: Path) -> None:
    held = {**tensors(1, torch.bfloat16), "wide": torch.ones(3, dtype=torch.float64)}
    paths = [folder(tmp_path / f"m{i}", held) for i in (1, 2)]
    merge(formulas.averaged(2), paths, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    offsets = {
        name: entry["data_offsets"][0] % np.dtype("f8" if name == "wide" else "f2").itemsize
        for name, entry in json.loads(content[8 : 8 + size]).items()
        if name != "__metadata__"
    }
    assert set(offsets.values()) == {0}
