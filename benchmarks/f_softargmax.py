"""The f-softargmax beside entmax's bisection, at equal accuracy, and beside softmax.

Forward passes on the CPU in float32. entmax's `entmax_bisect` is given as few halvings as bring its
largest error against float64 to ours, or 50 where it never gets there (its own default); the figure
is its time over ours. `relative_to_softmax` is our time over that of torch.softmax on the same
logits, in the same process; of the operators that entmax lacks there is that figure alone.

Settings are ROWSxVOCABULARY-SPREAD, the last the standard deviation of the logits. Run:
python benchmarks/f_softargmax.py [ROUNDS [SETTING ...]]          (about 6 minutes on two cores)
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from cabochon.core import Key
from cabochon.losses import f_divergences
from cabochon.losses.f_softargmax import f_softargmax
from side_by_side import compare, report, run_worker, seconds_each, worker_arguments

SETTINGS = ("16x262144-4", "1024x32768-4", "4096x1000-1")
ALPHAS = (1.5, 1.25, 2.0, 3.0)
OTHERS = (
    ("forward_kl",), ("reverse_kl",), ("jsd", 0.5), ("hellinger",), ("alpha", 0.5), ("jeffreys",),
)  # fmt: skip
CHECKED_ROWS = 8


def logits_of(setting: str) -> Tensor:
    """The logits of a setting."""
    sizes, spread = setting.split("-")
    rows, vocabulary = map(int, sizes.split("x"))
    return torch.randn(rows, vocabulary, generator=Key(1).generator()) * float(spread)


def error(found: Tensor, exact: Tensor) -> float:
    """The largest error of a probability."""
    return (found.double() - exact).abs().max().item()


def halvings(logits: Tensor, a: float, exact: Tensor, wanted: float) -> int:
    """The fewest with which entmax errs by no more than `wanted`; 50 if none does."""
    from entmax import entmax_bisect

    for steps in range(10, 50):
        if error(entmax_bisect(logits, a, n_iter=steps), exact) <= wanted:
            return steps
    return 50


def peer(logits: Tensor, a: float) -> tuple[Callable[[], Tensor], float]:
    """(entmax's operator, its error)."""
    from entmax import entmax_bisect

    some = logits[:CHECKED_ROWS]
    f = f_divergences.Alpha(a)
    exact = f_softargmax(f, some.double())
    steps = halvings(some, a, exact, max(error(f_softargmax(f, some), exact), 1e-7))
    found = error(entmax_bisect(some, a, n_iter=steps), exact)
    return lambda: entmax_bisect(logits, a, n_iter=steps), found


def ours(logits: Tensor, f: f_divergences.FDivergence) -> tuple[Callable[[], Tensor], float]:
    """(our operator, its error)."""
    some = logits[:CHECKED_ROWS]
    found = error(f_softargmax(f, some), f_softargmax(f, some.double()))
    return lambda: f_softargmax(f, logits), found


def work(side: str, setting: str) -> None:
    """What a fresh process does."""
    setting, kind = setting.split(":")
    logits = logits_of(setting)
    name, *parameter = kind.split("_of_")
    f = f_divergences.named(name, *map(float, parameter))
    step, found = peer(logits, float(parameter[0])) if side == "peer" else ours(logits, f)
    seconds = min(seconds_each(step, times=3))
    softmax = min(seconds_each(lambda: logits.softmax(-1), times=3))
    report(
        seconds=seconds, softmax_seconds=softmax, softmaxes=seconds / softmax, error_e6=1e6 * found
    )


def main(arguments: list[str]) -> None:
    """Every setting and operator in turn; the first is the one reported as ratio."""
    rounds = int(arguments[0]) if arguments else 3
    results = {}
    for setting in arguments[1:] or SETTINGS:
        for a in ALPHAS:
            label = f"{setting}:alpha_of_{a:g}"
            result = compare(__file__, label, rounds=rounds)
            results[label] = result
            print(
                f"{setting} alpha={a:g}: {result['ratio']:.1f} times as fast as entmax "
                f"(rounds {result['ratios']}), errors {result['ours']['error_e6']:.3f}e-6 "
                f"against {result['peer']['error_e6']:.3f}e-6; "
                f"{result['ours']['softmaxes']:.1f} softmaxes",
                flush=True,
            )
        others = {}
        for name, *parameter in OTHERS:
            label = "_of_".join([name, *(f"{p:g}" for p in parameter)])
            others[label] = round(
                run_worker(__file__, "ours", f"{setting}:{label}")["softmaxes"], 2
            )
            print(f"{setting} {label}: {others[label]:.1f} softmaxes", flush=True)
        results[setting] = others
    first = next(iter(results.values()))
    report(
        ratio=first["ratio"],
        relative_to_softmax=first["ours"]["softmaxes"],
        what=f"f-softargmax (alpha {ALPHAS[0]:g}) beside entmax.entmax_bisect at equal accuracy",
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        settings=results,
    )


if __name__ == "__main__":
    given = worker_arguments()
    work(*given) if given else main(sys.argv[1:])
