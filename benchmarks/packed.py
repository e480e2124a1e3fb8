"""Bytes of the packed format against dense ones, bit-for-bit round trip included.

python benchmarks/packed.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import write_result

import secateur as sc
from secateur.models.packed import pack, unpack

TEXT = """
The linear weights of the decoder blocks, pruned by magnitude, dense and packed (one bit per weight and the kept
values). `round trip` says whether every tensor came back bit for bit. At 50 % a packed 16-bit model takes 9 bits a
weight; plain 4-bit quantisation takes about 4.5 and is smaller.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    model, _ = sc.load(arguments.model)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        cast = model.to(dtype)
        for options in ({"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.7}):
            plan = sc.plan(cast, method="magnitude", options=options)
            pruned = sc.apply(plan, cast)
            tensors = {name: pruned.get_parameter(name).detach() for name in plan.masks}
            packed, shapes = pack(tensors)
            back = unpack(packed, shapes)
            dense_bytes, packed_bytes = (
                sum(t.numel() * t.element_size() for t in d.values()) for d in (tensors, packed)
            )
            view = torch.int16 if dtype == torch.bfloat16 else torch.int32
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "pruned": ", ".join(f"{k} {v}" for k, v in options.items()),
                    "dense MB": dense_bytes / 1e6,
                    "packed MB": packed_bytes / 1e6,
                    "ratio": packed_bytes / dense_bytes,
                    "round trip": all(torch.equal(back[n].view(view), t.view(view)) for n, t in tensors.items()),
                }
            )
            print(rows[-1], flush=True)
    setting = {"model": arguments.model, "seed": 0}
    write_result("packed-smollm2-135m", "Bytes of the packed format", setting, rows, TEXT)


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


if __name__ == "__main__":
    main()
