"""What is said about a checkpoint that was written."""

from __future__ import annotations

import json
from pathlib import Path


def how_to_load(folder: Path) -> str:
    """The lines of Python that load the checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    remote = ", trust_remote_code=True" if "auto_map" in config else ""
    return (
        f"saved to {folder}; load it with\n"
        "  from transformers import AutoModelForCausalLM\n"
        f'  model = AutoModelForCausalLM.from_pretrained("{folder}"{remote})'
    )
