"""All checks, one after the other; see ``secateur.verify``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from secateur.errors import ModelLoadError, PlanError, SecateurError
from secateur.models.loading import quiet
from secateur.models.sources import Source
from secateur.plans import find_plans
from secateur.remote import expanded
from secateur.verification.cuts import check_base, check_masks, check_units, open_base
from secateur.verification.findings import Finding
from secateur.verification.networks import check_network, is_network
from secateur.verification.plans import StoredPlan, check_plan, open_plan
from secateur.verification.trace import blocks_of, trace
from secateur.verification.weights import Checkpoint, check_finite, check_headers, check_manifest, check_shapes

__all__ = ["Finding", "verify_folder"]


def verify_folder(
    folder: str | Path,
    base: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Finding]:
    """See ``secateur.verify``."""
    folder = expanded(folder)
    if not folder.is_dir():
        raise ModelLoadError(f"there is no checkpoint folder at {folder}")
    with quiet():
        return _verify(folder, base, trust_remote_code, progress or (lambda stage, done, total: None))


def _verify(
    folder: Path, base: str | Path | None, trust_remote_code: bool, say: Callable[[str, int, int], None]
) -> list[Finding]:
    if is_network(folder):
        return _verify_network(folder, base, say)
    opened = open_base(base, trust_remote_code) if base is not None else None
    say("verify", 0, 4)
    findings = [check_manifest(folder)]
    headers, stored = check_headers(folder)
    say("verify", 1, 4)
    shapes, checkpoint = check_shapes(folder, trust_remote_code)
    findings += [headers, shapes, check_finite(stored)]
    say("verify", 2, 4)
    plans, finding = _open_plans(folder)
    findings.append(finding)
    if opened is not None:
        findings.append(check_base(plans[0], opened) if plans else _skipped("base model"))
        # another model says nothing about what the plan keeps
        opened = opened if findings[-1].ok else None
    say("verify", 3, 4)
    findings += _against_plans(checkpoint, plans, opened)
    say("verify", 4, 4)
    return findings


def _verify_network(folder: Path, base: str | Path | None, say: Callable[[str, int, int], None]) -> list[Finding]:
    say("verify", 0, 2)
    plans, finding = _open_plans(folder)
    more = [] if base is None else [Finding("base model", skipped="only language models are held against theirs")]
    say("verify", 1, 2)
    found = [check_manifest(folder), *check_network(folder, plans), finding, *more]
    say("verify", 2, 2)
    return found


def _open_plans(folder: Path) -> tuple[list[StoredPlan], Finding]:
    finding, plans = Finding("plan"), []
    if not (folder / "plan").exists() and not (folder / "plan.json").exists():
        finding.skipped = "the folder holds no plan"
        return plans, finding
    try:
        for place in find_plans(folder):
            plan = open_plan(place)
            check_plan(plan)
            plans.append(plan)
    except (PlanError, SecateurError) as error:
        finding.add(str(error))
        return [], finding
    finding.detail = f"{len(plans)} step{'s' if len(plans) > 1 else ''}: " + ", then ".join(_methods(p) for p in plans)
    return plans, finding


def _methods(plan: StoredPlan) -> str:
    return "+".join(p.method for p in plan.document.provenance)


def _against_plans(checkpoint: Checkpoint | None, plans: list[StoredPlan], base: Source | None) -> list[Finding]:
    if checkpoint is None or not plans:
        return [_skipped(name) for name in ("units", "zeros")]
    units = Finding("units")
    found = trace(plans, blocks_of(checkpoint.model), base.model if base else None, units)
    with units.noting():
        check_units(checkpoint, found, units)
    if not found.units:
        units.skipped = "the plan cuts no heads, neurons, blocks or tokens"
    return [units, check_masks(checkpoint, found, base)]


def _skipped(name: str) -> Finding:
    return Finding(name, skipped="it needs a sound plan and a sound checkpoint")
