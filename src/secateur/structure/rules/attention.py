"""Fused attention: query and key lanes are summed together, value lanes go on, heads run through all."""

from __future__ import annotations

from secateur.structure.rules.elementwise import aligned
from secateur.structure.trace import Call, Trace, Value, Zeros, rule
from secateur.structure.traced import BOTH


@rule("aten::scaled_dot_product_attention", zeros=Zeros.ATTENDED)
def attention(trace: Trace, call: Call) -> Value:
    q, k, v, mask = call["query"], call["key"], call["value"], call["attn_mask"]
    units = trace.units
    units.join(q.dims[-1], k.dims[-1])
    trace.sums(call, q.dims[-1], BOTH)
    for labels in (q.dims[-2], k.dims[-2], v.dims[-2]):
        units.pin(labels, "a position of the sequence")
    batch_q, batch_k, batch_v = q.dims[:-2], k.dims[:-2], v.dims[:-2]
    shared = aligned(trace, [Value(batch_k), Value(batch_v)], tuple(len(d) for d in batch_k)).dims
    if call["enable_gqa"] and len(q.dims) > 2 and len(batch_q[-1]) != len(shared[-1]):
        # query head k·r + j reads key-value head k
        kept, query = units.split(batch_q[-1], (len(shared[-1]), len(batch_q[-1]) // len(shared[-1])))
        units.join(kept, shared[-1])
        units.join(batch_q[-1], units.grid([kept, query]))
        shared = (*shared[:-1], batch_q[-1])
    batch = aligned(trace, [Value(batch_q), Value(tuple(shared))], call.shape[:-2])
    if mask is not None:
        aligned(trace, [mask, Value((*batch.dims, q.dims[-2], k.dims[-2]))], (*call.shape[:-1], len(k.dims[-2])))
    trace.lanes += [q.dims[-1], v.dims[-1]]
    trace.count(call, *batch.dims, q.dims[-2], k.dims[-2], q.dims[-1])
    trace.count(call, *batch.dims, q.dims[-2], k.dims[-2], v.dims[-1])
    return Value((*batch.dims, q.dims[-2], v.dims[-1]))
