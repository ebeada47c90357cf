"""A divergence from hidden states over a large vocabulary, of ours beside TRL's chunked path.

Forward and backward of the loss alone, from hidden states and heads of student and teacher to the
gradients of the student's, on the CPU: 1,024 rows, width 512, vocabulary 262,144. TRL's chunked
path (the loss of its DistillationTrainer) is the one that needs least time and memory there; its
GKD path, which builds all logits, runs as a further side where asked for (17 GB in float32).

Settings, DIVERGENCE-TYPE[-cap][-small]: jsd (beta 1/2, the paper's form, which is TRL's),
forward_kl or reverse_kl; float32 or bfloat16; both sides' logits capped at 30; 128 rows, width 64
and vocabulary 32,768 for a quick run. Prints per setting the seconds, the memory by which the work
rises above the loaded tensors (gradients included), and how much longer ours takes than its four
matrix products alone, which are timed in the same process, in turn.

Run: python benchmarks/distill_loss.py [ROUNDS [SETTING ...]]     (about 10 minutes on two cores)
     python benchmarks/distill_loss.py gkd [SETTING ...]          (one round against the GKD path)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from cabochon.core import Key, LinearPrediction, TokenBatch
from cabochon.losses import f_divergences, linear
from cabochon.losses.products import product_dtype
from side_by_side import compare, measured_memory, report, worker_arguments

SETTINGS = ("jsd-float32", "forward_kl-float32", "jsd-bfloat16")
TIMES = 2
"""How often a worker's work is timed after the run whose memory is measured."""


@dataclass(frozen=True)
class Sizes:
    """What a setting asks for."""

    name: str
    dtype: torch.dtype
    cap: float | None
    rows: int
    width: int
    vocabulary: int

    @staticmethod
    def of(setting: str) -> Sizes:
        name, dtype, *further = setting.split("-")
        sizes = (128, 64, 32768) if "small" in further else (1024, 512, 262144)
        return Sizes(name, getattr(torch, dtype), 30.0 if "cap" in further else None, *sizes)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states (1 rows width) and head of student, then of teacher; logits of std 3."""
        draw = Key(1).generator()

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float32)

        spread = 3.0 / self.width**0.5
        student, teacher = normal(1, self.rows, self.width), normal(1, self.rows, self.width)
        heads = (normal(self.vocabulary, self.width).mul_(spread) for _ in range(2))
        student_head, teacher_head = (head.to(self.dtype) for head in heads)
        return (
            student.to(self.dtype).requires_grad_(),
            student_head.requires_grad_(),
            teacher.to(self.dtype),
            teacher_head,
        )


def ours(sizes: Sizes) -> Callable[[], float]:
    """The mean divergence per row, with gradients in `.grad`."""
    hidden, head, teacher_hidden, teacher_head = sizes.tensors()
    ones = torch.ones(1, sizes.rows, dtype=torch.int64)
    batch = TokenBatch(tokens=ones, positions=ones, documents=ones, targets=ones, mask=ones.bool())
    f = f_divergences.named(*(("jsd_paper", 0.5) if sizes.name == "jsd" else (sizes.name,)))

    def step() -> float:
        hidden.grad = head.grad = None
        student = LinearPrediction(hidden=hidden, head=head, cap=sizes.cap)
        teacher = LinearPrediction(hidden=teacher_hidden, head=teacher_head, cap=sizes.cap)
        loss = linear.divergence(student, teacher, batch, f)
        mean = loss.total / loss.weight
        mean.backward()
        return mean.item()

    return step


def peer(sizes: Sizes) -> Callable[[], float]:
    """The same through what TRL's DistillationTrainer calls."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden, head, teacher_hidden, teacher_head = sizes.tensors()
    mask = torch.ones(1, sizes.rows, dtype=torch.int64)
    beta = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}[sizes.name]

    def step() -> float:
        hidden.grad = head.grad = None
        mean, _, _ = _chunked_divergence_loss(
            hidden,
            teacher_hidden,
            head,
            teacher_head,
            mask,
            beta,
            student_final_logit_softcapping=sizes.cap,
            teacher_final_logit_softcapping=sizes.cap,
        )
        mean.backward()
        return mean.item()

    return step


def gkd(sizes: Sizes) -> Callable[[], float]:
    """The same through TRL's GKDTrainer, from logits."""
    from trl.experimental.gkd import GKDTrainer

    hidden, head, teacher_hidden, teacher_head = sizes.tensors()
    beta = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}[sizes.name]

    def capped(logits: Tensor) -> Tensor:
        return logits if sizes.cap is None else sizes.cap * torch.tanh(logits / sizes.cap)

    def step() -> float:
        hidden.grad = head.grad = None
        with torch.no_grad():
            wanted = capped(teacher_hidden @ teacher_head.T)
        labels = torch.zeros(1, sizes.rows, dtype=torch.int64)
        mean = GKDTrainer.generalized_jsd_loss(
            capped(hidden @ head.T), wanted, labels=labels, beta=beta
        )
        mean.backward()
        return mean.item()

    return step


def products(sizes: Sizes) -> Callable[[], None]:
    """The four matrix products alone: two of logits, two of gradients, in ours' chunks of rows.

    As in any step, the memory of the gradients and of one chunk of logits is asked for anew. Where
    the processor only emulates bfloat16, float32 products are quicker, and are what is timed.
    """
    hidden, head, teacher_hidden, teacher_head = (t.detach() for t in sizes.tensors())
    quick = product_dtype(head)
    hidden, head = hidden.to(quick), head.to(quick)
    teacher_hidden, teacher_head = teacher_hidden.to(quick), teacher_head.to(quick)
    hidden, teacher_hidden = hidden[0], teacher_hidden[0]
    chunk = min(sizes.rows, 256)

    def step() -> None:
        raw, teacher_raw = (head.new_empty(chunk, sizes.vocabulary) for _ in range(2))
        by_hidden, by_head = torch.empty_like(hidden), torch.empty_like(head)
        for start in range(0, sizes.rows, chunk):
            span = slice(start, start + chunk)
            torch.mm(hidden[span], head.T, out=raw)
            torch.mm(teacher_hidden[span], teacher_head.T, out=teacher_raw)
            torch.mm(raw, head, out=by_hidden[span])
            torch.addmm(by_head, raw.T, hidden[span], beta=min(start, 1), out=by_head)

    return step


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """(seconds, seconds of processor time) of one call."""
    begin, busy = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - begin, time.process_time() - busy


def work(side: str, setting: str) -> None:
    """What a fresh process does: memory of the first step, then seconds of the quickest further."""
    sizes = Sizes.of(setting)
    step = {"ours": ours, "peer": peer, "gkd": gkd}[side](sizes)
    values: list[float] = []
    memory = measured_memory(lambda: values.append(step()))
    floor = products(sizes) if side == "ours" else None
    if floor is not None:
        floor()
    taken, floors = [], []
    for _ in range(TIMES):
        taken.append(timed(step))
        if floor is not None:
            floors.append(timed(floor))
    further: dict[str, float] = {}
    if floor is not None:
        pairs = list(zip(taken, floors, strict=True))
        further["products_seconds"] = min(seconds for seconds, _ in floors)
        further["over_products"] = median(own[0] / alone[0] for own, alone in pairs)
        further["over_products_cpu"] = median(own[1] / alone[1] for own, alone in pairs)
    report(
        seconds=min(seconds for seconds, _ in taken),
        cpu_seconds=min(busy for _, busy in taken),
        memory_mb=memory,
        loss=values[0],
        **further,
    )


def main(arguments: list[str]) -> None:
    """Every setting in turn; the figures of the first are the ones reported as ratio."""
    rival = "gkd" if arguments[:1] == ["gkd"] else "peer"
    rounds = int(arguments[0]) if arguments and rival == "peer" else 1 if rival == "gkd" else 2
    results = {}
    for setting in arguments[1:] or SETTINGS:
        result = results[setting] = compare(__file__, setting, rounds=rounds, sides=(rival, "ours"))
        theirs, own = result[rival], result["ours"]
        result["cpu_ratio"] = round(theirs["cpu_seconds"] / own["cpu_seconds"], 3)
        for name, side in ((rival, theirs), ("ours", own)):
            print(
                f"{setting:18} {name}: {side['seconds']:7.2f} s, {side['cpu_seconds']:7.2f} s of "
                f"processors, {side['memory_mb']:7.0f} MB, loss {side['loss']:.6f}",
                flush=True,
            )
        print(
            f"{setting:18} ratio {result['ratio']}, of processor time {result['cpu_ratio']}, "
            f"memory ratio {result['memory_ratio']}; over its products {own['over_products']}",
            flush=True,
        )
    first = next(iter(results.values()))
    report(
        benchmark="distill_loss",
        ratio=first["ratio"],
        memory_ratio=first["memory_ratio"],
        over_products=first["ours"]["over_products"],
        what=f"{next(iter(results))}: forward and backward from hidden states, CPU",
        peer="TRL, GKDTrainer.generalized_jsd_loss"
        if rival == "gkd"
        else "TRL, chunked divergence",
        threads=torch.get_num_threads(),
        **results,
    )


if __name__ == "__main__":
    found = worker_arguments()
    if found is None:
        main(sys.argv[1:])
    else:
        work(*found)
