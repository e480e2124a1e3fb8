"""From a plan and the dense model to a Report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from secateur.plans import Plan
from secateur.report.report import LayerCut, Metric, Report
from secateur.structure import HIDDEN, Anatomy
from secateur.structure.lexicon import VOCABULARY
from secateur.structure.rotated import rotated_size
from secateur.versions import library_versions, machine

BUDGET_WORDS = {
    "params": "parameters",
    "macs": "MACs",
    "bytes": "bytes",
    "kv_bytes": "bytes of the KV cache",
    "channels": "channels",
    "neurons": "FFN neurons",
    "hidden": "hidden size",
    "latency": "latency",
}


def build_report(plan: Plan, anatomy: Anatomy) -> Report:
    """What ``plan`` removes from the dense model of this ``anatomy``; whoever measures adds metrics and samples."""
    provenance = plan.provenance[-1]
    allocation = provenance.allocation
    gone = _removed(plan, anatomy)
    cut, masked = sum(cut for cut, _ in gone), sum(masked for _, masked in gone)
    achieved, coverage = _fraction(gone, plan, anatomy), plan.coverage
    return Report(
        model=plan.model.name,
        revision=plan.model.revision,
        method=plan.method,
        options=dict(provenance.options) | ({"allocate": allocation.label} if allocation else {}),
        requested=_requested(plan),
        achieved=achieved,
        masked=masked / max(anatomy.blocks.params - cut, 1),
        layers=[_layer_cut(layer, plan, anatomy, *parts) for layer, parts in enumerate(gone)],
        scores={name: scores.tolist() for name, scores in plan.scores.items()},
        # how many tokens stay is told in a note: their ids would be most of the page
        keep={name: kept.tolist() for name, kept in plan.keep.items() if name != VOCABULARY},
        calibration=provenance.calibration.model_dump() if provenance.calibration else None,
        metrics=_budget_metrics(plan),
        notes=[note for p in plan.provenance for note in p.notes],
        versions=library_versions(),
        machine=machine(),
        coverage=None if coverage is None else coverage.model_dump(mode="json"),
        of_all=None if coverage is None else achieved * coverage.share,
    )


def removed_fraction(plan: Plan, anatomy: Anatomy) -> float:
    """Fraction of the linear weights of all blocks that is gone (cut, or zero); of the tokens if only these are cut."""
    return _fraction(_removed(plan, anatomy), plan, anatomy)


def with_zeros_counted(report: Report, anatomy: Anatomy, zeros: Callable[[str], int]) -> Report:
    """The report of several steps with as many zeros as there are in the cut model, which has this ``anatomy``.

    How many entries two masks have in common follows from neither: a mask by chance takes others than the one before,
    and so does one that compares other entries, by rows or in a pattern. ``zeros`` counts those of a weight, by name.
    """
    there = [cut.layer for cut in report.layers if cut.units.get("layer") != (1, 0)]
    if not any(cut.masked for cut in report.layers) or len(there) != anatomy.num_layers:
        return report
    layers, total = {cut.layer: cut for cut in report.layers}, 0
    for layer, dense_layer in enumerate(there):
        cut, sizes = layers[dense_layer], _sizes(layer, anatomy)
        found = {tensor: zeros(tensor) for tensor in sizes}
        shares = {
            tensor.rpartition(f".{layer}.")[2].removesuffix(".weight"): count / sizes[tensor]
            for tensor, count in found.items()
        }
        masked = sum(found.values()) / max(sum(sizes.values()), 1)
        total += sum(found.values())
        layers[dense_layer] = replace(
            cut,
            sparsity=_masked_again(cut.sparsity, cut.masked, masked),
            matrices={name: shares.get(name, before) for name, before in cut.matrices.items()},
            masked=masked,
        )
    masked = total / max(anatomy.blocks.params, 1)
    achieved, of_all = _masked_again(report.achieved, report.masked, masked), report.of_all
    if of_all is not None:
        of_all = _masked_again(of_all, report.masked * report.share, masked * report.share)
    return replace(report, layers=list(layers.values()), masked=masked, achieved=achieved, of_all=of_all)


def _masked_again(removed: float, before: float, now: float) -> float:
    """What is removed in all where a mask makes another fraction of what is left zero than it did before."""
    left = (1.0 - removed) / (1.0 - before) if before < 1 else 1.0
    return 1.0 - left * (1.0 - now)


def _fraction(gone: list[tuple[float, float]], plan: Plan, anatomy: Anatomy) -> float:
    if set(plan.keep) == {VOCABULARY} and not plan.masks:
        return 1 - len(plan.keep[VOCABULARY]) / plan.groups[VOCABULARY]
    return sum(map(sum, gone)) / max(anatomy.blocks.params, 1)


def _removed(plan: Plan, anatomy: Anatomy) -> list[tuple[float, float]]:
    """``_removed_in`` of every block."""
    return [_removed_in(layer, plan, anatomy) for layer in range(anatomy.num_layers)]


def _requested(plan: Plan) -> str:
    parts = []
    for p in plan.provenance:
        options = p.options
        if options.get("pattern"):
            parts.append(f"{options['pattern']} of the weights")
        elif options.get("layers"):
            parts.append(f"{options['layers']} blocks")
        elif options.get("sublayers"):
            parts.append(f"{options['sublayers']} sub-layers")
        elif p.options.get("min_count"):
            parts.append(f"the tokens that are read fewer than {options['min_count']} times")
        elif HIDDEN in plan.keep and len(plan.provenance) == 1:
            parts.append(f"{100 * options['sparsity']:.1f} % of the hidden size")
        elif p.budgets:
            left = (f"{100 * account.asked:.1f} % of the {BUDGET_WORDS[name]}" for name, account in p.budgets.items())
            parts.append(f"{' and '.join(left)} left")
        else:
            only_tokens = len(plan.provenance) == 1 and set(plan.keep) == {VOCABULARY}
            what = BUDGET_WORDS.get(options.get("budget", ""), "tokens" if only_tokens else "weights")
            parts.append(f"{100 * options.get('sparsity', 0):.1f} % of the {what}")
    return ", then ".join(parts)


def _budget_metrics(plan: Plan) -> list[Metric]:
    """What was asked of every budget, and what is expected; a parameter is counted, a latency was measured by parts."""
    return [
        Metric(
            f"budget: {BUDGET_WORDS[name]}",
            account.unit,
            {"dense": account.dense, "pruned": account.pruned},
            higher_is_better=False,
            protocol=f"at most {account.asked:.1%} asked, {account.pruned / account.dense:.1%} expected",
        )
        for p in plan.provenance
        for name, account in p.budgets.items()
    ]


def _layer_cut(layer: int, plan: Plan, anatomy: Anatomy, cut: float, masked: float) -> LayerCut:
    units = {}
    for group in anatomy.groups:
        if group.layer == layer and group.name in plan.keep:
            units[group.kind] = (group.units, len(plan.keep[group.name]))
    if "layers" in plan.keep:
        units["layer"] = (1, int(layer in set(plan.keep["layers"].tolist())))
    sizes = _sizes(layer, anatomy)
    refitted = _refitted(plan, sizes)
    matrices = {
        m.module.rpartition(f".{layer}.")[2]: plan.sparsity(m.tensor)
        for m in anatomy.matrices
        if m.layer == layer and m.tensor in plan.masks and m.tensor not in refitted
    }
    total = sum(m.shape[0] * m.shape[1] for m in anatomy.matrices if m.layer == layer)
    return LayerCut(layer, units, (cut + masked) / max(total, 1), matrices, masked / max(total - cut, 1))


def _removed_in(layer: int, plan: Plan, anatomy: Anatomy) -> tuple[float, float]:
    """Linear weights of one block that are cut, and those of the others that a mask makes zero.

    A mask and a cut of one plan are counted as independent.
    """
    sizes = _sizes(layer, anatomy)
    total = sum(sizes.values())
    if plan.rotations:
        size, width = next(iter(plan.rotations.values())).shape
        return total - rotated_size(anatomy, layer, plan.rotations, size, width), 0.0
    if "layers" in plan.keep and layer not in set(plan.keep["layers"].tolist()):
        return total, 0.0
    cut = sum(
        (group.units - len(plan.keep[group.name])) * group.cost.macs
        for group in anatomy.groups
        if group.layer == layer and group.name in plan.keep
    )
    refitted = _refitted(plan, sizes)
    masked = sum(plan.sparsity(t) * size for t, size in sizes.items() if t in plan.masks and t not in refitted)
    # every matrix of a block has the hidden channels along one of its sides
    narrower = len(plan.removed(HIDDEN)) / plan.groups[HIDDEN] if HIDDEN in plan.keep else 0.0
    left = 1 - narrower
    return total - left * (total - cut), left * masked * (1 - cut / max(total, 1))


def _sizes(layer: int, anatomy: Anatomy) -> dict[str, int]:
    return {m.tensor: m.shape[0] * m.shape[1] for m in anatomy.matrices if m.layer == layer}


def _refitted(plan: Plan, sizes: Mapping[str, int]) -> set[str]:
    """Weights among these whose mask says nothing but where their new values lie."""
    return {tensor for tensor in sizes if tensor in plan.masks and plan.refits(tensor)}
