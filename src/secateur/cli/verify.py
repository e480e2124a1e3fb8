"""``secateur verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import Json, Quiet, TrustRemoteCode
from secateur.cli.output import print_json, show, working


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder.")],
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="The dense model that the plan was made for.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    from secateur import api

    with working(quiet) as progress:
        findings = api.verify(folder, base, trust_remote_code=trust_remote_code, progress=progress)
    ok = all(finding.ok for finding in findings)
    if json:
        print_json({"folder": str(folder), "ok": ok, "checks": [finding.to_dict() for finding in findings]})
    else:
        from secateur.report.tables import checks_table

        show(checks_table([finding.to_dict() for finding in findings]))
        show(*(f"{f.check}: {sentence}" for f in findings for sentence in f.sentences()))
    if not ok:
        raise typer.Exit(1)
