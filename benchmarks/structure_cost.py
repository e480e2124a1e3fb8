"""How long it takes to trace a network, group its channels and cut it, beside Torch-Pruning.

    python benchmarks/structure_cost.py

needs torchvision, torch-pruning and the built-in model smollm2-135m. Everything runs on one thread.
Every measurement has a process of its own, forked from one that has imported everything and has cut a small network
with both libraries, so that nobody pays for imports; the libraries take turns.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from breadth_check import final_layers, first_line
from common import write_result
from torch import nn
from zoo import Case, Only

import secateur as sc
from secateur.networks import applying, modules
from secateur.structure import modulecut
from secateur.structure import trace as tracing

STAGES = {
    "export": (tracing, "export"),
    "trace": (applying, "trace"),
    "group": (applying, "traced_anatomy"),
    "decide": (modules, "decide_channels"),
    "cut": (applying, "cut_graph"),
    "export again": (modulecut, "export"),
    "own module": (applying, "cut_module"),
}
"""What is timed by itself: functions where they are looked up; ``trace`` and ``own module`` hold an export each."""

CLAIMED = {"ResNet-50": 3.0, "ViT-B/16": 5.0, "SmolLM2-135M": 15.0}
"""Seconds in which a network should be cut."""

TEXT = """
30 % of all channels leave, by the L1 norm of their slices relative to the mean of their group, all groups ranked
together: `sc.prune(..., method="spa_l1", budget="channels")`, and `MagnitudePruner` of Torch-Pruning with the same
norm, told which layers make the output. `seconds` is processor time of the whole call, the median of the repeats, and
`wall` what the clock said beside it. `times Torch-Pruning` is the median of the ratios within a repeat. `peak MB` is
what the process grew by at most; secateur leaves the network as it is and returns a cut copy, Torch-Pruning changes it
in place. `result` says whether the cut network runs on the inputs.

Where secateur's time goes: `export` is torch's own `torch.export`; `rules` are those of the operators; `group` finds
units and their costs; `decide` scores and chooses; `cut` makes the cut graph and runs it on fake tensors; `proof` edits
a copy of the module, exports it once more (`export again`) and compares both graphs call by call.
`trace / export` is what finding out what is coupled costs, export included, in units of the export. `without proof` is
the whole without the last stage: tracing, grouping, choosing and the cut graph. `own` is that without the export, too.

What it shows:

- Finding out what is coupled adds 2 to 30 % to the export, far less than the factor of 3 that was allowed.
- Every network is done within the seconds that were `claimed`, with the proof that the edited module computes the same.
- Torch-Pruning is 2 to 5 times faster. It follows autograd and needs no export, of which each of our two takes half to
  twice as long as all that it does. What is `own` to secateur takes 0.9 to 1.5 times its time. Its cut ViT and SmolLM2
  don't run as they are: it doesn't know what their code does with the number of heads.
"""

Found = dict[str, Any]


def secateur(case: Case) -> tuple[nn.Module, Found]:
    """The cut module, and seconds by stage."""
    stages: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    with _timed(stages):
        result = sc.prune(
            case.module,
            example_inputs=case.args,
            example_kwargs=case.kwargs,
            method="spa_l1",
            sparsity=0.3,
            budget="channels",
        )
    about = {
        "export s": stages["export"],
        "rules s": stages["trace"] - stages["export"],
        "group s": stages["group"],
        "decide s": stages["decide"],
        "cut s": stages["cut"],
        "proof s": stages["own module"],
        "own s": sum(stages[name] for name in ("trace", "group", "decide", "cut")) - stages["export"],
        "export again s": stages["export again"],
        "trace / export": stages["trace"] / stages["export"],
    }
    return result.model, about


@contextmanager
def _timed(stages: dict[str, float]) -> Iterator[None]:
    """Add up the processor time of every call of the stages."""

    def timing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                stages[name] += time.process_time() - start

        return timed

    before = {name: getattr(module, attribute) for name, (module, attribute) in STAGES.items()}
    try:
        for name, (module, attribute) in STAGES.items():
            setattr(module, attribute, timing(name, before[name]))
        yield
    finally:
        for name, (module, attribute) in STAGES.items():
            setattr(module, attribute, before[name])


def torch_pruning(case: Case) -> tuple[nn.Module, Found]:
    """The module, cut in place."""
    import torch_pruning as tp

    pruner = tp.pruner.MagnitudePruner(
        case.module,
        example_inputs=dict(case.kwargs) or case.args,
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        global_pruning=True,
        pruning_ratio=0.3,
        ignored_layers=final_layers(case.module, case),
    )
    pruner.step()
    return case.module, {}


LIBRARIES: dict[str, Callable[[Case], tuple[nn.Module, Found]]] = {
    "secateur": secateur,
    "torch-pruning": torch_pruning,
}


def measure(library: str, case: Case) -> Found:
    """Time and memory of one cut, in a process of its own. Raises RuntimeError when that dies."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(library, case, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process of {library} died") from None
    finally:
        child.join()


def _work(library: str, case: Case, sender: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    before = _resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        module, found = LIBRARIES[library](case)
    except Exception as error:  # how long it took until then is a result too
        module, found = None, {"result": first_line(error)}
    found |= {"seconds": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    found["peak MB"] = _resident_mb("VmHWM") - before
    sender.send(found if module is None else found | {"result": _runs(module, case)})


def _resident_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(name))


def _runs(module: nn.Module, case: Case) -> str:
    try:
        with torch.no_grad():
            module(*case.args, **case.kwargs)
    except Exception as error:
        return first_line(error)
    return "runs"


def vision(name: str) -> Case:
    """A classifier of torchvision with random weights."""
    import torchvision

    torch.manual_seed(0)
    return Case(torchvision.models.get_model(name).eval(), (torch.randn(1, 3, 224, 224),))


def language() -> Case:
    """SmolLM2-135M, without a cache."""
    from secateur.models.loading import load_model

    model = load_model("smollm2-135m")[0]
    model.config.use_cache = False
    words = model.config.vocab_size
    ids = torch.randint(words, (1, 128), generator=torch.Generator().manual_seed(0))
    return Case(Only(model, "logits").eval(), kwargs={"input_ids": ids}, classes=words)


CASES: dict[str, Callable[[], Case]] = {
    "ResNet-50": lambda: vision("resnet50"),
    "ViT-B/16": lambda: vision("vit_b_16"),
    "SmolLM2-135M": language,
}


def small() -> Case:
    """What is cut once before anything is measured."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    return Case(nn.Sequential(body, nn.Linear(8 * 16, 10)).eval(), (torch.randn(1, 3, 8, 8),), classes=10)


def rows_of(name: str, taken: dict[str, list[Found]]) -> list[dict[str, Any]]:
    """One row per library from all repeats; times are medians."""
    rows = []
    for library, found in taken.items():
        row: dict[str, Any] = {"network": name, "library": library}
        for key in ("seconds", "wall", "peak MB"):
            row[key] = statistics.median(f[key] for f in found)
        row["range"] = f"{min(f['seconds'] for f in found):.2f} to {max(f['seconds'] for f in found):.2f}"
        if library == "secateur":
            row["claimed"] = CLAIMED[name]
            row["without proof"] = statistics.median(f["seconds"] - f["proof s"] for f in found)
            for key, of in (("times Torch-Pruning", "seconds"), ("its memory", "peak MB")):
                pairs = zip(found, taken["torch-pruning"], strict=True)
                row[key] = statistics.median(mine[of] / theirs[of] for mine, theirs in pairs)
            for key in [k for k in found[0] if k.endswith(" s") or " / " in k]:
                row[key] = statistics.median(f[key] for f in found)
        rows.append({**row, "result": found[0]["result"].replace("|", "/")})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--networks", nargs="+", choices=tuple(CLAIMED), default=list(CLAIMED))
    arguments = parser.parse_args()
    # a process that is forked has no use for the threads of this one
    torch.set_num_threads(1)
    for library in LIBRARIES.values():
        library(small())
    chosen = {name: CASES[name]() for name in arguments.networks}
    taken = {name: {library: [] for library in LIBRARIES} for name in chosen}
    for _ in range(arguments.repeats):
        for name, case in chosen.items():
            for library in LIBRARIES:
                taken[name][library].append(measure(library, case))
                print(name, library, taken[name][library][-1], flush=True)
    rows = [row for name in chosen for row in rows_of(name, taken[name])]
    setting = {
        "models": "torchvision resnet50 and vit_b_16 with random weights; SmolLM2-135M as installed",
        "inputs": "1x3x224x224; 128 tokens",
        "removed": "30% of the channels",
        "repeats": arguments.repeats,
        "seed": 0,
        "threads": 1,
        "others": {p: importlib.metadata.version(p) for p in ("torchvision", "torch-pruning")},
    }
    write_result("structure-cost", "What tracing, grouping and cutting cost", setting, rows, TEXT)


if __name__ == "__main__":
    main()
