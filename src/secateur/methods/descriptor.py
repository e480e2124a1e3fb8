"""What a method is, in the words of the survey's taxonomy."""

from __future__ import annotations

from dataclasses import dataclass

DESCRIPTOR_VALUES: dict[str, tuple[str, ...]] = {
    "object": (
        "weights",
        "heads_and_neurons",
        "layers",
        "sublayers",
        "channels",
        "kv_cache",
        "vocabulary",
        "hidden_states",
    ),
    "granularity": ("element", "structured_group", "layer", "token", "channel"),
    "when": ("post", "before_training", "during_training", "inference"),
    "score": (
        "magnitude",
        "activation",
        "gradient",
        "second_order",
        "similarity",
        "random",
        "synaptic_flow",
        "density",
        "loss",
        "attention",
        "position",
        "frequency",
        "policy",
    ),
    "allocation": ("uniform", "global", "erk", "by_layer", "by_head"),
    "recovery": ("none", "bias", "least_squares", "fresh_weights", "training"),
    "data": ("none", "unlabelled_calibration", "labelled_calibration", "training_batches"),
    "supervision": ("none", "labels"),
    "speedup": ("none", "memory_only", "real"),
}


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """What a method is, in the words of the survey's taxonomy; other code reads this instead of asking for names.

    Raises ValueError when a field has a value outside ``DESCRIPTOR_VALUES``.
    """

    object: str
    granularity: str
    when: str = "post"
    score: str
    allocation: str
    recovery: str = "none"
    data: str
    supervision: str = "none"
    speedup: str

    def __post_init__(self) -> None:
        for name, allowed in DESCRIPTOR_VALUES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"descriptor.{name} must be one of {allowed}, got {getattr(self, name)!r}")
