"""What ``secateur prune`` measures once the pruned checkpoint is there."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.models.sources import Source
    from secateur.plans import Plan
    from secateur.recipes import Recipe
    from secateur.report import Report
    from secateur.runs.pipeline import StepResult

DEFAULT_PROMPT = "The most important thing about gardening is"
PROMPT_TOKENS = 40
# up to this many bytes of weights, loading two models costs nobody anything
SMALL_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Measurement:
    """Completes the report of a run. ``sample`` asks for a sentence of both models whenever they are loaded.

    Without loading anything, the sizes of the two checkpoints are counted in their files.
    """

    job: Recipe
    progress: Any
    measure: bool | None = None
    prompt: str | None = None
    sample: bool = False
    trust_remote_code: bool = False

    def __call__(
        self, source: Source, tokenizer: PreTrainedTokenizerBase | None, result: StepResult, report: Report
    ) -> None:
        if not self._loads(source):
            self._count(source, result, report)
            return
        from secateur import api

        how: Any = {"dtype": "auto", "device": self.job.device, "trust_remote_code": self.trust_remote_code}
        dense: Any = source.model
        if source.folder is not None:
            dense, _ = api.load(source.folder, **how)
        pruned, _ = api.load(result.folder, **how)
        table = api.evaluate(
            {"dense": dense, "pruned": pruned},
            tokenizer,
            list(dict.fromkeys([*self.job.evaluate, *_asked(result.plan), "size"])),
            length=self.job.calibration.length,
            windows=self.job.windows,
            seed=self.job.calibration.seed,
            text_field=self.job.calibration.text_field,
            tokenizers={"pruned": result.tokenizer},
            progress=self.progress,
        )
        report.metrics = [*table, *report.metrics]
        prompt = self.prompt or (DEFAULT_PROMPT if self.sample else None)
        if prompt is not None and tokenizer is not None:
            from secateur.report import Sample

            models = {"dense": dense, "pruned": pruned}
            readers = {"dense": tokenizer, "pruned": result.tokenizer or tokenizer}
            outputs = {name: continuation(model, readers[name], prompt) for name, model in models.items()}
            report.samples = [*report.samples, Sample(prompt, outputs)]

    def check(self, source: Source, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuse what can't be measured, as far as tasks know, before hours of work. Raises UsageError, DataError."""
        from secateur.evaluation import Checked, Settings, make_task

        if self.measure is False:
            return
        data = self.job.calibration
        settings = Settings(length=data.length, windows=self.job.windows, seed=data.seed, text_field=data.text_field)
        # which is measured whenever both models are loaded
        always = ["size"] if self._loads(source) else []
        for task in map(make_task, [*self.job.evaluate, *always]):
            if isinstance(task, Checked):
                task.check(source.model, tokenizer, settings)

    def _loads(self, source: Source) -> bool:
        if self.measure is not None:
            return self.measure
        size = sum(p.numel() * p.element_size() for p in source.model.parameters())
        return bool(self.job.evaluate or self.prompt) or size <= SMALL_BYTES

    def _count(self, source: Source, result: StepResult, report: Report) -> None:
        from secateur.evaluation.size import stored_size
        from secateur.models.opening import open_source

        pruned, _ = open_source(result.folder, trust_remote_code=self.trust_remote_code)
        for tally in result.tallies.values():
            pruned.know(tally.zeros)
        try:
            report.metrics = [*stored_size({"dense": source, "pruned": pruned}), *report.metrics]
        finally:
            pruned.close()


def _asked(plan: Plan) -> list[str]:
    """What must be measured to see whether the budgets of a plan are met: the rest is counted."""
    return [f"request:{p.options['workload']}" for p in plan.provenance if "latency" in p.budgets]


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What a model makes of a prompt: at most 40 tokens, greedily.

    Where the model has fewer positions than that takes, it reads the end of the prompt.
    """
    import torch

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    written = min(PROMPT_TOKENS, positions // 2)
    ids_BT = tokenizer(prompt, return_tensors="pt")["input_ids"][:, written - positions :].to(model.device)
    generate: Any = model.generate
    with torch.inference_mode():
        output_BT = generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=written,
            do_sample=False,
            # sampling parameters of the checkpoint's generation config don't go with greedy decoding
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(output_BT[0, ids_BT.shape[1] :], skip_special_tokens=True))
