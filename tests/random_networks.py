"""Random small networks, drawn from the operators that people write networks with.

A network is a chain of pieces. Each piece is made for the shape that it gets (without the batch): an image (C, H, W),
a sequence (T, D) or a vector (D,). Printing a network prints its pieces, one a line, so a failing one is made smaller
by hand: ``RandomNetwork(seed, only=[0, 2, 5])`` keeps those pieces that still fit.

A channel that is zero stays zero in every piece but those that average over channels, so that a channel whose
parameters are zero is as good as gone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]
Forward = Callable[[Any, Tensor], Tensor]
"""(the piece, with its parts and its tensors) and the input → the output."""

BATCH = 2
IMAGE, SEQUENCE, VECTOR = 3, 2, 1


class Piece(nn.Module):
    """``forward`` gets the piece itself, so that a copy of it computes with its own parts."""

    def __init__(self, text: str, forward: Forward, *parts: nn.Module, **tensors: Tensor) -> None:
        super().__init__()
        self.text, self.run, self.parts = text, forward, nn.ModuleList(parts)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not name.startswith("c_"):
                setattr(self, name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


Maker = Callable[[random.Random, Shape], "Piece | None"]
MAKERS: dict[int, dict[str, Maker]] = {IMAGE: {}, SEQUENCE: {}, VECTOR: {}}


def piece(*ranks: int) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        for rank in ranks:
            MAKERS[rank][make.__name__.rstrip("_")] = make
        return make

    return register


def divisors(n: int) -> list[int]:
    return [d for d in range(2, n) if n % d == 0]


def pick(rng: random.Random, options: Sequence[Any]) -> Any:
    return options[rng.randrange(len(options))] if options else None


def zeros(*shape: int) -> Tensor:
    """A parameter to be: its values come from the test."""
    return torch.zeros(shape)


WIDTHS = (4, 6, 8, 12)
ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "square": torch.square,
    "relu6": F.relu6,
    "mish": F.mish,
    "abs": torch.abs,
    "half": lambda x: x / 2,
    "dropout": F.dropout,
    "softsign": F.softsign,
}


@piece(IMAGE, SEQUENCE, VECTOR)
def activation(rng: random.Random, shape: Shape) -> Piece:
    name = pick(rng, sorted(ACTIVATIONS))
    function = ACTIVATIONS[name] if name != "dropout" else lambda x: F.dropout(x, training=False)
    return Piece(name, lambda p, x: function(x))


# -- any shape: along the channels, which are dimension 1 of an image and the last of the others ----------------------


def along(shape: Shape) -> tuple[int, int]:
    """(dimension of the channels in a batch, how many)."""
    return (1, shape[0]) if len(shape) == IMAGE else (len(shape), shape[-1])


def same(rng: random.Random, shape: Shape, width: int | None = None) -> nn.Module:
    """Something with weights that changes only the number of channels."""
    _dim, channels = along(shape)
    width = width or channels
    if len(shape) != IMAGE:
        return nn.Linear(channels, width, bias=rng.random() < 0.6)
    size = pick(rng, [1, 3])
    return nn.Conv2d(channels, width, size, padding=size // 2, bias=rng.random() < 0.6)


@piece(IMAGE, SEQUENCE, VECTOR)
def weights(rng: random.Random, shape: Shape) -> Piece:
    width = pick(rng, WIDTHS)
    return Piece(f"weights to {width}", lambda p, x: p.parts[0](x), same(rng, shape, width))


@piece(IMAGE, SEQUENCE, VECTOR)
def residual(rng: random.Random, shape: Shape) -> Piece:
    width, act = pick(rng, WIDTHS), ACTIVATIONS["relu"]
    first, second = (
        same(rng, shape, width),
        same(rng, (width, *shape[1:]) if len(shape) == IMAGE else (*shape[:-1], width), along(shape)[1]),
    )
    return Piece(f"residual over {width}", lambda p, x: x + p.parts[1](act(p.parts[0](x))), first, second)


@piece(IMAGE, SEQUENCE, VECTOR)
def binary(rng: random.Random, shape: Shape) -> Piece:
    name = pick(rng, ["add", "sub", "mul", "maximum", "where", "lerp", "gate", "addcmul"])
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": torch.add,
        "sub": lambda x, y: x - 0.5 * y,
        "mul": torch.mul,
        "maximum": torch.maximum,
        "where": lambda x, y: torch.where(x > 0, x, y),
        "lerp": lambda x, y: torch.lerp(x, y, 0.3),
        "gate": lambda x, y: x * torch.sigmoid(y),
        "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    }
    return Piece(f"{name} of itself and weights", lambda p, x: functions[name](x, p.parts[0](x)), same(rng, shape))


@piece(IMAGE, SEQUENCE, VECTOR)
def twice(rng: random.Random, shape: Shape) -> Piece:
    return Piece("weights twice", lambda p, x: p.parts[0](torch.relu(p.parts[0](x))), same(rng, shape))


@piece(IMAGE, SEQUENCE, VECTOR)
def cat(rng: random.Random, shape: Shape) -> Piece:
    dim, _ = along(shape)
    width, order = pick(rng, (4, 6)), pick(rng, [(0, 1), (1, 0), (0, 1, 0), (1, 1)])
    return Piece(
        f"cat {order} of itself and weights to {width}",
        lambda p, x: torch.cat([(x, p.parts[0](x))[i] for i in order], dim=dim),
        same(rng, shape, width),
    )


@piece(IMAGE, SEQUENCE, VECTOR)
def slices(rng: random.Random, shape: Shape) -> Piece | None:
    dim, n = along(shape)
    if n < 4:
        return None
    chosen = pick(
        rng, [slice(0, n // 2), slice(1, n), slice(None, None, 2), slice(-3, None), slice(1, -1), slice(n // 3, n)]
    )
    where = (slice(None),) * dim + (chosen,)
    return Piece(f"slice {chosen} of {n}", lambda p, x: x[where])


@piece(IMAGE, SEQUENCE, VECTOR)
def halves(rng: random.Random, shape: Shape) -> Piece | None:
    dim, n = along(shape)
    if n % 2 or n < 4:
        return None
    how = pick(rng, ["chunk, mul", "chunk, swap", "split, add", "glu", "rotate", "unbalanced"])

    def run(p: Any, x: Tensor) -> Tensor:
        if how == "glu":
            return F.glu(x, dim)
        if how == "unbalanced":
            a, b = x.split([1, n - 1], dim)
            return torch.cat([b, a], dim)
        a, b = x.chunk(2, dim) if "chunk" in how or how == "rotate" else x.split(n // 2, dim)
        if how == "rotate":
            return x + torch.cat([-b, a], dim)
        return a * b if "mul" in how else a + b if "add" in how else torch.cat([b, a], dim)

    return Piece(f"halves: {how}", run)


@piece(IMAGE, SEQUENCE, VECTOR)
def padded(rng: random.Random, shape: Shape) -> Piece:
    dim, _ = along(shape)
    before, after = pick(rng, [(1, 2), (0, 1), (2, 0), (-1, 0), (1, -1)])
    amounts = [0, 0] * (len(shape) - dim) + [before, after]
    return Piece(f"pad channels {before} {after}", lambda p, x: F.pad(x, amounts))


@piece(IMAGE, SEQUENCE, VECTOR)
def constant_index(rng: random.Random, shape: Shape) -> Piece:
    dim, n = along(shape)
    index = torch.tensor([rng.randrange(n) for _ in range(pick(rng, (4, 6, 9)))])
    how = pick(rng, ["index_select", "brackets", "flip", "permutation"])
    if how == "permutation":
        index = torch.tensor(rng.sample(range(n), n))

    def run(p: Any, x: Tensor) -> Tensor:
        if how == "flip":
            return x.flip(dim)
        return x[(slice(None),) * dim + (p.index,)] if how == "brackets" else x.index_select(dim, p.index)

    return Piece(f"{how} {index.tolist()}", run, index=index)


@piece(IMAGE, SEQUENCE, VECTOR)
def repeated(rng: random.Random, shape: Shape) -> Piece | None:
    dim, n = along(shape)
    if n > 12:
        return None
    how = pick(rng, ["repeat", "interleave", "expand", "expand outer"])

    def run(p: Any, x: Tensor) -> Tensor:
        if how == "repeat":
            return x.repeat(*(2 if d == dim else 1 for d in range(x.dim())))
        if how == "interleave":
            return x.repeat_interleave(2, dim=dim)
        at = dim + (how == "expand")
        return x.unsqueeze(at).expand(*x.shape[:at], 2, *x.shape[at:]).flatten(dim, dim + 1)

    return Piece(how, run)


@piece(IMAGE, SEQUENCE, VECTOR)
def grouped_view(rng: random.Random, shape: Shape) -> Piece | None:
    dim, n = along(shape)
    groups = pick(rng, divisors(n))
    if groups is None:
        return None
    how = pick(rng, ["sum outer", "mean inner", "amax outer", "scale groups", "swap", "scale inner", "norm", "select"])
    behind = (1,) * (len(shape) - dim)

    def run(p: Any, x: Tensor) -> Tensor:
        parts = x.unflatten(dim, (groups, n // groups))
        if how.endswith("outer"):
            return getattr(parts, how.split()[0])(dim)
        if how == "mean inner":
            return parts.mean(dim + 1)
        if how == "select":
            return parts.select(dim, 1)
        if how == "norm":
            parts = F.normalize(parts, dim=dim + 1)
        if how == "swap":
            parts = parts.transpose(dim, dim + 1)
        if how.startswith("scale"):
            parts = parts * p.scale
        return parts.flatten(dim, dim + 1)

    scale = zeros(groups, 1, *behind) if how == "scale groups" else zeros(n // groups, *behind)
    return Piece(f"{groups} groups: {how}", run, **({"scale": scale} if how.startswith("scale") else {}))


@piece(IMAGE, SEQUENCE, VECTOR)
def runs_over(rng: random.Random, shape: Shape) -> Piece:
    """Something that needs all channels or averages over them."""
    dim, n = along(shape)
    how = pick(rng, ["softmax", "mean", "sum", "amax", "cumsum", "normalise", "standardise", "roll"])
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda x: x.softmax(dim),
        "mean": lambda x: x - x.mean(dim, keepdim=True),
        "sum": lambda x: x * x.sum(dim, keepdim=True).expand_as(x) / n,
        "amax": lambda x: x * torch.tanh(x.amax(dim, keepdim=True)),
        "cumsum": lambda x: x.cumsum(dim),
        "normalise": lambda x: x / x.norm(dim=dim, keepdim=True).clamp(min=0.1),
        "standardise": lambda x: (
            (x - x.mean(dim, keepdim=True)) / (x.var(dim, keepdim=True, correction=0) + 0.1).sqrt()
        ),
        "roll": lambda x: x.roll(1, dim),
    }
    return Piece(f"{how} over channels", lambda p, x: functions[how](x))


@piece(IMAGE, SEQUENCE, VECTOR)
def stacked(rng: random.Random, shape: Shape) -> Piece:
    at, how = pick(rng, [0, 1, -1]), pick(rng, ["sum", "mean", "amax", "first", "unbind"])

    def run(p: Any, x: Tensor) -> Tensor:
        both = torch.stack([x, p.parts[0](x)], dim=at)
        if how == "unbind":
            first, second = both.unbind(at)
            return first * second
        return both.select(at, 0) if how == "first" else getattr(both, how)(at)

    return Piece(f"stack at {at}, {how}", run, same(rng, shape))


@piece(IMAGE, SEQUENCE, VECTOR)
def own_parameter(rng: random.Random, shape: Shape) -> Piece:
    dim, n = along(shape)
    behind = (1,) * (len(shape) - dim)
    how = pick(rng, ["scale", "shift", "both", "whole shift", "expanded"])
    if how == "whole shift":
        return Piece(how, lambda p, x: x + p.shift, shift=zeros(1, *shape))
    if how == "expanded":
        return Piece(how, lambda p, x: torch.cat([x, p.extra.expand(x.shape[0], *shape)], dim), extra=zeros(1, *shape))

    def run(p: Any, x: Tensor) -> Tensor:
        x = x * p.scale if how != "shift" else x
        return x + p.shift if how != "scale" else x

    return Piece(f"{how} by a parameter", run, scale=zeros(n, *behind), shift=zeros(n, *behind))


@piece(IMAGE, SEQUENCE, VECTOR)
def tied(rng: random.Random, shape: Shape) -> Piece:
    """A matrix and its transpose."""
    dim, n = along(shape)
    width = pick(rng, WIDTHS)

    def run(p: Any, x: Tensor) -> Tensor:
        x = x.movedim(dim, -1)
        return F.linear(torch.relu(F.linear(x, p.weight)), p.weight.t()).movedim(-1, dim)

    return Piece(f"tied over {width}", run, weight=zeros(width, n))


@piece(IMAGE, SEQUENCE, VECTOR)
def contracted(rng: random.Random, shape: Shape) -> Piece:
    """A raw parameter in a product, written in different ways."""
    dim, n = along(shape)
    width, how = pick(rng, WIDTHS), pick(rng, ["einsum", "matmul", "left"])
    letters = {IMAGE: "bchw,oc->bohw", SEQUENCE: "btc,oc->bto", VECTOR: "bc,oc->bo"}[len(shape)]

    def run(p: Any, x: Tensor) -> Tensor:
        if how == "einsum":
            return torch.einsum(letters, x, p.weight)
        if how == "left":
            return (
                (p.weight @ x.movedim(dim, 1).flatten(2 if len(shape) > 1 else 1).reshape(BATCH, n, -1))
                .reshape(BATCH, width, *[s for d, s in enumerate(shape, start=1) if d != dim])
                .movedim(1, dim)
            )
        return (x.movedim(dim, -1) @ p.weight.t()).movedim(-1, dim)

    return Piece(f"{how} to {width}", run, weight=zeros(width, n))


# -- images -----------------------------------------------------------------------------------------------------------


@piece(IMAGE)
def grouped_conv(rng: random.Random, shape: Shape) -> Piece | None:
    groups = pick(rng, divisors(shape[0]))
    if groups is None:
        return None
    made = groups * pick(rng, [1, 2, 3])
    conv = nn.Conv2d(shape[0], made, 3, padding=1, groups=groups, bias=rng.random() < 0.6)
    return Piece(f"conv {shape[0]} to {made} in {groups} groups", lambda p, x: p.parts[0](x), conv)


@piece(IMAGE)
def depthwise(rng: random.Random, shape: Shape) -> Piece | None:
    times = pick(rng, [1, 2])
    if shape[0] > 12:
        return None
    conv = nn.Conv2d(shape[0], shape[0] * times, 3, padding=1, groups=shape[0])
    return Piece(f"depthwise times {times}", lambda p, x: p.parts[0](x), conv)


@piece(IMAGE)
def transposed_conv(rng: random.Random, shape: Shape) -> Piece | None:
    if shape[1] > 6:
        return None
    groups = pick(rng, [1, 1, *divisors(shape[0]), shape[0]])
    made = groups * pick(rng, [1, 2, 3])
    conv = nn.ConvTranspose2d(shape[0], made, 2, stride=pick(rng, [1, 2]), groups=groups, bias=rng.random() < 0.6)
    return Piece(f"transposed conv {shape[0]} to {made} in {groups} groups", lambda p, x: p.parts[0](x), conv)


@piece(IMAGE)
def image_norm(rng: random.Random, shape: Shape) -> Piece | None:
    if shape[1] * shape[2] < 2:
        return None
    groups = pick(rng, [1, shape[0], *divisors(shape[0])])
    norm = pick(
        rng,
        [
            nn.BatchNorm2d(shape[0]),
            nn.BatchNorm2d(shape[0], affine=False),
            nn.GroupNorm(groups, shape[0]),
            nn.GroupNorm(groups, shape[0], affine=False),
            nn.InstanceNorm2d(shape[0], affine=True),
            nn.InstanceNorm2d(shape[0], affine=True, track_running_stats=True),
            nn.LayerNorm(shape),
        ],
    )
    return Piece(str(norm), lambda p, x: p.parts[0](x), norm)


@piece(IMAGE)
def channels_last_norm(rng: random.Random, shape: Shape) -> Piece:
    norm = pick(rng, [nn.LayerNorm(shape[0]), nn.RMSNorm(shape[0]), nn.LayerNorm(shape[0], elementwise_affine=False)])
    return Piece(f"channels last {norm}", lambda p, x: p.parts[0](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm)


@piece(IMAGE)
def pool(rng: random.Random, shape: Shape) -> Piece | None:
    if shape[1] < 4 or shape[2] < 4:
        return None
    part = pick(
        rng,
        [
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.AdaptiveAvgPool2d(2),
            nn.AdaptiveMaxPool2d(2),
            nn.LPPool2d(2, 2),
            nn.AvgPool2d(3, 2, 1),
        ],
    )
    return Piece(str(part), lambda p, x: p.parts[0](x), part)


@piece(IMAGE)
def resize(rng: random.Random, shape: Shape) -> Piece | None:
    if shape[1] > 4:
        return None
    mode = pick(rng, ["nearest", "bilinear", "bicubic", "nearest-exact"])
    return Piece(f"upsample {mode}", lambda p, x: F.interpolate(x, scale_factor=2, mode=mode))


@piece(IMAGE)
def pixel_shuffle(rng: random.Random, shape: Shape) -> Piece | None:
    if shape[0] % 4 == 0 and shape[0] > 4 and shape[1] <= 6:
        return Piece("pixel shuffle", lambda p, x: F.pixel_shuffle(x, 2))
    if shape[0] <= 6 and shape[1] % 2 == 0 and shape[2] % 2 == 0:
        return Piece("pixel unshuffle", lambda p, x: F.pixel_unshuffle(x, 2))
    return None


@piece(IMAGE)
def channel_shuffle(rng: random.Random, shape: Shape) -> Piece | None:
    groups = pick(rng, divisors(shape[0]))
    if groups is None:
        return None
    if rng.random() < 0.5:
        return Piece(f"nn.ChannelShuffle({groups})", lambda p, x: p.parts[0](x), nn.ChannelShuffle(groups))

    def run(p: Any, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2)
        return x.reshape(batch, channels, height, width)

    return Piece(f"channel shuffle in {groups}", run)


@piece(IMAGE)
def image_pad(rng: random.Random, shape: Shape) -> Piece | None:
    if shape[1] > 6 or shape[1] < 2 or shape[2] < 2:
        return None
    mode = pick(rng, ["constant", "reflect", "replicate"])
    return Piece(f"pad {mode}", lambda p, x: F.pad(x, (1, 1, 0, 1), mode=mode))


@piece(IMAGE)
def squeeze_excite(rng: random.Random, shape: Shape) -> Piece:
    width, how = pick(rng, (2, 4)), pick(rng, ["linear", "conv"])
    if how == "conv":
        first, second = nn.Conv2d(shape[0], width, 1), nn.Conv2d(width, shape[0], 1)
    else:
        first, second = nn.Linear(shape[0], width), nn.Linear(width, shape[0])

    def run(p: Any, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1) if how == "conv" else x.mean((2, 3))
        scale = torch.sigmoid(p.parts[1](torch.relu(p.parts[0](pooled))))
        return x * (scale if how == "conv" else scale[:, :, None, None])

    return Piece(f"squeeze and excite over {width} by {how}", run, first, second)


@piece(IMAGE)
def prelu(rng: random.Random, shape: Shape) -> Piece:
    count = pick(rng, [1, shape[0]])
    return Piece(f"prelu {count}", lambda p, x: p.parts[0](x), nn.PReLU(count))


@piece(IMAGE)
def spatial_attention(rng: random.Random, shape: Shape) -> Piece:
    def run(p: Any, x: Tensor) -> Tensor:
        weights = p.parts[0](x).flatten(2).softmax(-1)
        pooled = (x.flatten(2) @ weights.transpose(1, 2)).unsqueeze(-1)
        return x + pooled

    return Piece("attention over places", run, nn.Conv2d(shape[0], 1, 1))


@piece(IMAGE)
def non_local(rng: random.Random, shape: Shape) -> Piece:
    width = pick(rng, (4, 6))

    def run(p: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).flatten(2) for part in p.parts[:3])
        out = (q.transpose(1, 2) @ k).softmax(-1) @ v.transpose(1, 2)
        return x + p.parts[3](out.transpose(1, 2).reshape(x.shape[0], width, *x.shape[2:]))

    convs = [nn.Conv2d(shape[0], width, 1) for _ in range(3)]
    return Piece(f"non-local over {width}", run, *convs, nn.Conv2d(width, shape[0], 1))


@piece(IMAGE)
def to_sequence(rng: random.Random, shape: Shape) -> Piece:
    how = pick(rng, ["flatten, transpose", "permute, reshape"])
    if how == "flatten, transpose":
        return Piece(how, lambda p, x: x.flatten(2).transpose(1, 2))
    return Piece(how, lambda p, x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]))


@piece(IMAGE)
def patches(rng: random.Random, shape: Shape) -> Piece | None:
    """Patches with their channels inside, as Swin merges them."""
    if shape[1] % 2 or shape[2] % 2 or shape[0] > 8:
        return None
    c, h, w = shape

    def run(p: Any, x: Tensor) -> Tensor:
        x = x.view(-1, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(x.shape[0], h * w // 4, c * 4)

    return Piece("patches", run)


@piece(IMAGE)
def to_vector(rng: random.Random, shape: Shape) -> Piece | None:
    how = pick(rng, ["flatten", "flatten last", "mean", "amax", "sum"])
    if how.startswith("flatten") and shape[0] * shape[1] * shape[2] > 128:
        how = "mean"
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "flatten": lambda x: x.flatten(1),
        "flatten last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
        "mean": lambda x: x.mean((2, 3)),
        "amax": lambda x: x.amax((-2, -1)),
        "sum": lambda x: x.sum((2, 3)),
    }
    return Piece(how, lambda p, x: functions[how](x))


# -- sequences --------------------------------------------------------------------------------------------------------


@piece(SEQUENCE)
def attention(rng: random.Random, shape: Shape) -> Piece:
    heads, lanes, values = pick(rng, (2, 3)), pick(rng, (2, 4)), pick(rng, (2, 4))
    how = pick(rng, ["matmul", "sdpa", "einsum", "causal", "masked"])
    q, k = nn.Linear(shape[1], heads * lanes), nn.Linear(shape[1], heads * lanes)
    v, o = nn.Linear(shape[1], heads * values), nn.Linear(heads * values, shape[1])

    def run(p: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (heads, -1)) for part in p.parts[:3])
        if how == "einsum":
            scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * lanes**-0.5
            return x + p.parts[3](torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v).flatten(2))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if how in ("matmul", "masked"):
            scores = q @ k.transpose(-1, -2) * lanes**-0.5
            if how == "masked":
                mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
                scores = scores.masked_fill(~mask, float("-inf"))
            out = scores.softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=how == "causal")
        return x + p.parts[3](out.transpose(1, 2).flatten(2))

    return Piece(f"attention {how}, {heads} heads of {lanes} and {values}", run, q, k, v, o)


@piece(SEQUENCE)
def fused_attention(rng: random.Random, shape: Shape) -> Piece:
    heads, lanes = pick(rng, (2, 3, 4)), pick(rng, (2, 4))
    how = pick(rng, ["permute", "chunk", "split heads", "unbind", "inner"])

    def run(p: Any, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = p.parts[0](x)
        if how == "permute":
            q, k, v = qkv.reshape(batch, length, 3, heads, lanes).permute(2, 0, 3, 1, 4)
        elif how == "unbind":
            q, k, v = qkv.view(batch, length, 3, heads, lanes).transpose(1, 3).unbind(2)
        elif how == "inner":
            q, k, v = qkv.view(batch, length, heads, 3 * lanes).transpose(1, 2).chunk(3, -1)
        elif how == "chunk":
            q, k, v = (t.view(batch, length, heads, lanes).transpose(1, 2) for t in qkv.chunk(3, -1))
        else:
            q, k, v = qkv.view(batch, length, 3 * heads, lanes).transpose(1, 2).split(heads, dim=1)
        out = (q * lanes**-0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + p.parts[1](out.transpose(1, 2).reshape(batch, length, heads * lanes))

    parts = nn.Linear(shape[1], 3 * heads * lanes), nn.Linear(heads * lanes, shape[1])
    return Piece(f"fused attention by {how}, {heads} heads of {lanes}", run, *parts)


@piece(SEQUENCE)
def grouped_query_attention(rng: random.Random, shape: Shape) -> Piece:
    kv, times, lanes = pick(rng, (2, 3)), 2, pick(rng, (2, 4))
    how = pick(rng, ["interleave", "expand", "flag", "grouped query", "one head"])
    kv = 1 if how == "one head" else kv
    heads = kv * times

    def run(p: Any, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = p.parts[0](x).view(batch, length, heads, lanes).transpose(1, 2)
        k, v = (part(x).view(batch, length, kv, lanes).transpose(1, 2) for part in p.parts[1:3])
        if how == "interleave":
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        if how in ("expand", "one head"):
            k, v = (t[:, :, None].expand(batch, kv, times, length, lanes).flatten(1, 2) for t in (k, v))
        if how == "grouped query":
            q = q.reshape(batch, kv, times, length, lanes)
            scores = torch.einsum("bgrqe,bgke->bgrqk", q, k) * lanes**-0.5
            out = torch.einsum("bgrqk,bgke->bgrqe", scores.softmax(-1), v).flatten(1, 2)
        else:
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=how == "flag")
        return p.parts[3](out.transpose(1, 2).reshape(batch, length, -1))

    parts = [nn.Linear(shape[1], heads * lanes), *(nn.Linear(shape[1], kv * lanes) for _ in range(2))]
    return Piece(
        f"grouped-query attention {how}, {kv} × {times} heads of {lanes}",
        run,
        *parts,
        nn.Linear(heads * lanes, shape[1]),
    )


@piece(SEQUENCE)
def rotary_attention(rng: random.Random, shape: Shape) -> Piece:
    heads, lanes = 2, 4
    angle = torch.outer(torch.arange(shape[0]), 1.0 / 10 ** (torch.arange(0, lanes, 2) / lanes))
    table = torch.cat([angle, angle], -1)

    def run(p: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (heads, lanes)).transpose(1, 2) for part in p.parts[:3])

        def turned(t: Tensor) -> Tensor:
            a, b = t[..., : lanes // 2], t[..., lanes // 2 :]
            return t * p.c_cos + torch.cat([-b, a], -1) * p.c_sin

        out = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        return x + p.parts[3](out.transpose(1, 2).flatten(2))

    parts = [nn.Linear(shape[1], heads * lanes, bias=False) for _ in range(3)]
    return Piece(
        "rotary attention", run, *parts, nn.Linear(heads * lanes, shape[1]), c_cos=table.cos(), c_sin=table.sin()
    )


@piece(SEQUENCE)
def normed_heads(rng: random.Random, shape: Shape) -> Piece:
    """Queries and keys with a norm over the lanes of each head, and linear attention."""
    heads, lanes = 2, 4
    norms = [pick(rng, [nn.LayerNorm, nn.RMSNorm])(lanes) for _ in range(2)]

    def run(p: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(*x.shape[:2], heads, lanes) for part in p.parts[:3])
        q, k = p.parts[4](q).transpose(1, 2), p.parts[5](k).transpose(1, 2)
        out = q @ (k.transpose(-1, -2) @ v.transpose(1, 2))
        return x + p.parts[3](out.transpose(1, 2).flatten(2))

    parts = [nn.Linear(shape[1], heads * lanes) for _ in range(3)]
    return Piece(f"linear attention with {norms[0]}", run, *parts, nn.Linear(heads * lanes, shape[1]), *norms)


@piece(SEQUENCE)
def torch_attention(rng: random.Random, shape: Shape) -> Piece | None:
    heads = pick(rng, [d for d in divisors(shape[1]) if shape[1] // d > 1])
    if heads is None:
        return None
    weights = rng.random() < 0.5
    part = nn.MultiheadAttention(shape[1], heads, batch_first=True)
    return Piece(
        f"nn.MultiheadAttention({shape[1]}, {heads})", lambda p, x: p.parts[0](x, x, x, need_weights=weights)[0], part
    )


@piece(SEQUENCE)
def encoder_layer(rng: random.Random, shape: Shape) -> Piece | None:
    if shape[1] % 2:
        return None
    part = nn.TransformerEncoderLayer(shape[1], 2, 6, batch_first=True, norm_first=rng.random() < 0.5)
    return Piece("nn.TransformerEncoderLayer", lambda p, x: p.parts[0](x), part)


@piece(SEQUENCE)
def feed_forward(rng: random.Random, shape: Shape) -> Piece:
    width, how = pick(rng, (4, 6)), pick(rng, ["swiglu", "fused", "glu", "plain"])
    wide = nn.Linear(shape[1], width if how in ("swiglu", "plain") else 2 * width)

    def run(p: Any, x: Tensor) -> Tensor:
        h = p.parts[0](x)
        if how == "swiglu":
            h = F.silu(h) * p.parts[2](x)
        if how == "fused":
            gate, up = h.chunk(2, -1)
            h = F.gelu(gate) * up
        if how == "glu":
            h = F.glu(h)
        return x + p.parts[1](torch.relu(h))

    return Piece(f"feed forward {how} over {width}", run, wide, nn.Linear(width, shape[1]), nn.Linear(shape[1], width))


@piece(SEQUENCE)
def recurrent(rng: random.Random, shape: Shape) -> Piece:
    kind, hidden = pick(rng, [nn.LSTM, nn.GRU, nn.RNN]), pick(rng, (3, 4, 6))
    layers, both, first = pick(rng, [1, 1, 2]), rng.random() < 0.3, rng.random() < 0.7
    part = kind(shape[1], hidden, num_layers=layers, bidirectional=both, batch_first=first, bias=rng.random() < 0.8)

    def run(p: Any, x: Tensor) -> Tensor:
        return p.parts[0](x)[0] if first else p.parts[0](x.transpose(0, 1))[0].transpose(0, 1)

    return Piece(str(part), run, part)


@piece(SEQUENCE)
def last_state(rng: random.Random, shape: Shape) -> Piece:
    part = pick(rng, [nn.LSTM, nn.GRU])(shape[1], 4, batch_first=True)

    def run(p: Any, x: Tensor) -> Tensor:
        state = p.parts[0](x)[1]
        return (state[0] if isinstance(state, tuple) else state)[-1]

    return Piece(f"last state of {part}", run, part)


@piece(SEQUENCE)
def sequence_norm(rng: random.Random, shape: Shape) -> Piece:
    norm = pick(
        rng, [nn.LayerNorm(shape[1]), nn.RMSNorm(shape[1]), nn.LayerNorm(shape[1], bias=False), nn.LayerNorm(shape)]
    )
    return Piece(str(norm), lambda p, x: p.parts[0](x), norm)


@piece(SEQUENCE)
def conv1d(rng: random.Random, shape: Shape) -> Piece:
    groups = pick(rng, [1, 1, shape[1]])
    conv = nn.Conv1d(shape[1], groups * 6 if groups == 1 else shape[1], 3, padding=2, groups=groups)

    def run(p: Any, x: Tensor) -> Tensor:
        return p.parts[0](x.transpose(1, 2))[..., : shape[0]].transpose(1, 2)

    return Piece(f"causal conv in {groups} groups", run, conv)


@piece(SEQUENCE)
def mixer(rng: random.Random, shape: Shape) -> Piece:
    width = pick(rng, (4, 6))
    # biases over tokens would make something of a channel that is zero
    first, last = nn.Linear(shape[0], width, bias=False), nn.Linear(width, shape[0], bias=False)

    def run(p: Any, x: Tensor) -> Tensor:
        return x + p.parts[1](F.gelu(p.parts[0](x.transpose(1, 2)))).transpose(1, 2)

    return Piece(f"mixes tokens over {width}", run, first, last)


@piece(SEQUENCE)
def class_token(rng: random.Random, shape: Shape) -> Piece:
    def run(p: Any, x: Tensor) -> Tensor:
        return torch.cat([p.token.expand(x.shape[0], -1, -1), x], dim=1) + p.place

    return Piece("class token and places", run, token=zeros(1, 1, shape[1]), place=zeros(1, shape[0] + 1, shape[1]))


@piece(SEQUENCE)
def neighbours(rng: random.Random, shape: Shape) -> Piece | None:
    if shape[0] < 3:
        return None
    how = pick(rng, ["difference", "cat", "cumsum"])
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "difference": lambda x: x[:, 1:] - x[:, :-1],
        "cat": lambda x: torch.cat([x[:, 1:], x[:, :-1]], -1),
        "cumsum": lambda x: x.cumsum(1),
    }
    return Piece(f"neighbours: {how}", lambda p, x: functions[how](x))


@piece(SEQUENCE)
def sequence_to_vector(rng: random.Random, shape: Shape) -> Piece:
    how = pick(rng, ["first", "last", "mean", "max", "flatten"])
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "first": lambda x: x[:, 0],
        "last": lambda x: x[:, -1],
        "mean": lambda x: x.mean(1),
        "max": lambda x: x.max(1).values,
        "flatten": lambda x: x.reshape(x.shape[0], -1),
    }
    return Piece(how, lambda p, x: functions[how](x))


@piece(SEQUENCE)
def to_image(rng: random.Random, shape: Shape) -> Piece | None:
    if shape[0] % 2:
        return None
    return Piece("to image", lambda p, x: x.transpose(1, 2).reshape(x.shape[0], shape[1], 2, shape[0] // 2))


# -- vectors ----------------------------------------------------------------------------------------------------------


@piece(VECTOR)
def vector_norm(rng: random.Random, shape: Shape) -> Piece:
    norm = pick(rng, [nn.BatchNorm1d(shape[0]), nn.LayerNorm(shape[0])])
    return Piece(str(norm), lambda p, x: p.parts[0](x), norm)


@piece(VECTOR)
def bilinear(rng: random.Random, shape: Shape) -> Piece | None:
    if shape[0] > 8:
        return None
    parts = nn.Linear(shape[0], 4), nn.Bilinear(shape[0], 4, 6)
    return Piece("bilinear", lambda p, x: p.parts[1](x, torch.relu(p.parts[0](x))), *parts)


@piece(VECTOR)
def outer(rng: random.Random, shape: Shape) -> Piece | None:
    if shape[0] > 8:
        return None
    how = pick(rng, ["einsum", "broadcast", "bmm"])

    def run(p: Any, x: Tensor) -> Tensor:
        y = p.parts[0](x)
        if how == "einsum":
            return torch.einsum("bi,bj->bij", x, y).flatten(1)
        return ((x[:, :, None] * y[:, None]) if how == "broadcast" else torch.bmm(x[:, :, None], y[:, None])).flatten(1)

    return Piece(f"outer product by {how}", run, nn.Linear(shape[0], 3))


@piece(VECTOR)
def experts(rng: random.Random, shape: Shape) -> Piece:
    """A soft mixture of experts whose weights lie in one tensor."""
    count, width = 3, pick(rng, (4, 6))

    def run(p: Any, x: Tensor) -> Tensor:
        gate = p.parts[0](x).softmax(-1)
        hidden = torch.relu(torch.einsum("bi,xoi->bxo", x, p.up))
        return torch.einsum("bx,bxo,xoi->bi", gate, hidden, p.down)

    return Piece(
        f"{count} experts over {width}",
        run,
        nn.Linear(shape[0], count),
        up=zeros(count, width, shape[0]),
        down=zeros(count, width, shape[0]),
    )


@piece(VECTOR)
def vector_to_image(rng: random.Random, shape: Shape) -> Piece | None:
    if shape[0] % 4 or shape[0] < 8:
        return None
    return Piece("to image", lambda p, x: x.view(x.shape[0], shape[0] // 4, 2, 2))


@piece(VECTOR)
def vector_to_sequence(rng: random.Random, shape: Shape) -> Piece | None:
    count = pick(rng, divisors(shape[0]))
    if count is None:
        return None
    how = pick(rng, ["view", "expand"])
    if how == "expand":
        return Piece("to sequence by expand", lambda p, x: x[:, None].expand(-1, 3, -1) * p.scale, scale=zeros(3, 1))
    return Piece(f"to sequence of {count}", lambda p, x: x.view(x.shape[0], count, -1))


# -- whole networks ---------------------------------------------------------------------------------------------------


def first_piece(rng: random.Random) -> tuple[Piece, Tensor]:
    """What reads the input, and an input."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    width, kind = pick(rng, WIDTHS), pick(rng, ["image", "image", "tokens", "features", "vector"])
    if kind == "tokens":
        x = torch.randint(7, (BATCH, 4), generator=generator)
        return Piece(f"embedding to {width}", lambda p, x: p.parts[0](x), nn.Embedding(7, width)), x
    shape = {"image": (3, 4, 4), "features": (4, 5), "vector": (5,)}[kind]
    x = torch.randn((BATCH, *shape), generator=generator, dtype=torch.float64)
    part = same(rng, shape, width)
    return Piece(f"{kind}: {part}", lambda p, x: torch.relu(p.parts[0](x)), part), x


class RandomNetwork(nn.Module):
    """The network of a seed. ``only`` keeps these pieces, by the numbers that are printed before them."""

    def __init__(self, seed: int, pieces: int = 4, only: Sequence[int] | None = None) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.seed = seed
        first, self.example = first_piece(rng)
        self.pieces, self.numbers = nn.ModuleList([first]), [0]
        with torch.no_grad():
            shape = tuple(self._run(self.example, torch.float32).shape[1:])
            for number in range(1, pieces + 1):
                made = self._draw(rng, shape)
                if only is not None and number not in only:
                    continue
                self.pieces.append(made)
                self.numbers.append(number)
                shape = tuple(self._run(self.example, torch.float32).shape[1:])
        width = along(shape)[1]
        self.head = nn.Linear(width, 3) if len(shape) != IMAGE else nn.Conv2d(width, 3, 1)

    def _draw(self, rng: random.Random, shape: Shape) -> Piece:
        makers = MAKERS[len(shape)]
        while True:
            made = makers[pick(rng, sorted(makers))](rng, shape)
            if made is not None:
                return made.eval()

    def _run(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype) if x.is_floating_point() else x
        for part in self.pieces:
            x = part(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        for part in self.pieces:
            x = part(x)
        return self.head(x)

    def __str__(self) -> str:
        lines = [f"{n}: {p.text}" for n, p in zip(self.numbers, self.pieces, strict=True)]
        return f"RandomNetwork({self.seed}, only={self.numbers[1:]}):\n" + "\n".join(lines)
