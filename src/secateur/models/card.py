"""The model card of a pruned checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from secateur.report.card import card

if TYPE_CHECKING:
    from secateur.plans import Plan
    from secateur.report import Report


def model_card(
    name: str,
    *,
    base_name: str = "",
    plans: Sequence[Plan] = (),
    report: Report | None = None,
    format: str = "dense",
    remote: bool = False,
) -> str:
    """README.md of a checkpoint of a language model; ``remote`` says that it needs its modelling file."""
    return card(
        name,
        front={"library_name": "transformers", "pipeline_tag": "text-generation"},
        loading=_loading(name, format, remote),
        base="a language model",
        base_name=base_name,
        plans=plans,
        report=report,
    )


def _loading(name: str, format: str, remote: bool) -> str:
    options = ", trust_remote_code=True" if remote else ""
    lines = ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines.append(f'model = AutoModelForCausalLM.from_pretrained("{name}"{options})')
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")', "```", ""]
    if remote:
        why = (
            "its weights are packed" if format == "packed" else "its layers have sizes that the stock class can't hold"
        )
        lines.append(f"`trust_remote_code` runs `modeling_secateur.py` in this folder, because {why}.")
        lines.append("Where secateur is installed, `secateur.load` does without.")
    else:
        lines.append("This is a plain checkpoint: stock transformers loads it.")
    return "\n".join([*lines, ""])
