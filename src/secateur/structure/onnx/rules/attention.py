"""Attention as one operator: heads lie in a dimension of their own, or are merged with their lanes."""

from __future__ import annotations

from dataclasses import replace

from secateur.structure.onnx.trace import OnnxTrace, operands, rule, shared
from secateur.structure.rules import attention
from secateur.structure.traced import Call, NoRule, Value, Zeros


@rule("Attention", zeros=Zeros.ATTENDED)
def attend(trace: OnnxTrace, call: Call) -> Value:
    q, k, v, mask, *rest = operands(call, 7)
    if any(r is not None for r in rest) or len(call.shapes) > 1:
        raise NoRule("it goes on from earlier tokens")
    counts = (call.get("q_num_heads"), call.get("kv_num_heads"), call.get("kv_num_heads"))
    merged = len(q.dims) == 3
    if merged:
        q, k, v = (_parted(trace, value, count) for value, count in zip((q, k, v), counts, strict=True))
    inner = replace(call, shapes=((*q.shape[:-1], v.shape[-1]),))
    given = {"query": q, "key": k, "value": v, "attn_mask": mask, "enable_gqa": True}
    made: Value = shared(attention.attention, trace, inner, "aten::scaled_dot_product_attention", **given)
    if not merged:
        return made
    batch, heads, tokens, lanes = made.dims
    return Value((batch, tokens, trace.units.grid([heads, lanes])))


def _parted(trace: OnnxTrace, value: Value, heads: int) -> Value:
    """[batch, heads, tokens, lanes] of [batch, tokens, heads · lanes]."""
    batch, tokens, width = value.dims
    head, lanes = trace.units.split(width, (heads, len(width) // heads))
    trace.units.join(width, trace.units.grid([head, lanes]))
    return Value((batch, head, tokens, lanes))
