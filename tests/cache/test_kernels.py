"""Kernels of decode attention beside a dense softmax: every way of storing rows, all dtypes, masks, and none at all."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

import secateur as sc
from cache_reference import generate, random_surrogate
from families import make_tiny, tiny_ids
from secateur.cache import kernels
from secateur.cache.attention import Visible, mixed_attention
from secateur.cache.kernels import Problem, Rectangle, compiler, cpu
from secateur.cache.rows import DenseRows, Rows, ThinRows
from secateur.cache.store import Store
from secateur.cache.tiles import BitmapRows
from secateur.errors import UsageError

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
# keys and values: dense, thin, bitmap
KINDS = ("dd", "td", "dt", "bb", "bd", "db")
LENGTHS = {"equal": [[150, 150], [150, 150]], "ragged": [[70, 5], [0, 200]]}


def thinned(x: Tensor, lengths: Tensor, generator: torch.Generator) -> Rows:
    width = x.shape[-1]
    drawn = [torch.randperm(width, generator=generator)[: width // 2].sort().values for _ in range(lengths.numel())]
    return ThinRows.encode(x, lengths.flatten(), torch.stack(drawn))


def encoded(kind: str, x: Tensor, by: str, lengths: Tensor, generator: torch.Generator) -> Rows:
    if kind == "d":
        return DenseRows(x)
    if kind == "t":
        return thinned(x, lengths, generator)
    smallest = x.float().abs().kthvalue(max(1, int(0.7 * x.shape[-1])), dim=-1, keepdim=True).values
    return BitmapRows.encode(x.masked_fill(x.float().abs() < smallest, 0), lengths, by)


class Example:
    """Two sequences of two key-value heads behind a text of 337 tokens, of which the last 37 are dense."""

    def __init__(self, kinds="bb", width=64, dtype=torch.float32, lengths="equal", group=3, new=1, mask=None, cap=None):
        g = torch.Generator().manual_seed(0)
        counts = torch.tensor(LENGTHS[lengths])
        sides = (torch.randn(int(counts.sum()), width, generator=g).to(dtype) for _ in range(2))
        rows = [encoded(k, x, by, counts, g) for k, x, by in zip(kinds, sides, ("token", "channel"), strict=True)]
        chosen = [torch.randperm(300, generator=g)[:n].sort().values for n in counts.flatten().tolist()]
        positions = torch.cat(chosen).to(torch.int32) if lengths == "ragged" else None
        self.store = Store(counts, *rows, positions)
        self.tail = tuple(torch.randn(2, 2, 37, width, generator=g).to(dtype) for _ in range(2))
        self.tail_positions = torch.arange(300, 337).expand(2, 2, 37)
        self.query = torch.randn(2, 2 * group, new, width, generator=g).to(dtype)
        self.visible = Visible(self.mask_of(mask, new, dtype, g), new, 337)
        self.scaling, self.softcap = width**-0.5, cap

    @staticmethod
    def mask_of(kind, new, dtype, generator):
        if kind is None:
            return None
        seen = torch.rand(2, 1, new, 337, generator=generator) < 0.7
        if kind == "padding":
            return torch.arange(337)[None] >= torch.tensor([[0], [40]])
        if kind == "added":
            return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
        return seen if kind == "unseen" else torch.zeros_like(seen)

    @property
    def problem(self) -> Problem:
        parts = (self.store, Rectangle(*self.tail, self.tail_positions))
        return Problem(self.query, parts, *self.visible.by_token(), 337, self.scaling, self.softcap)

    def expected(self) -> Tensor:
        """Segment by segment on dense rows in float64."""
        out = torch.empty(*self.query.shape, dtype=torch.float64)
        group = self.query.shape[1] // 2
        for span, b, k in self.store.spans():
            for i, j in itertools.product(range(span.shape[0]), range(span.shape[1])):
                bb, kk = (b.start or 0) + i, (k.start or 0) + j
                keys, values = (side.dense(span)[i, j].double() for side in (self.store.keys, self.store.values))
                keys, values = (
                    torch.cat([s, t[bb, kk].double()]) for s, t in zip((keys, values), self.tail, strict=True)
                )
                at = torch.cat([self.store.text_positions(span)[i, j], self.tail_positions[bb, kk]])[None, None]
                logits = self.query[bb, kk * group : (kk + 1) * group].double() @ keys.mT * self.scaling
                if self.softcap is not None:
                    logits = self.softcap * torch.tanh(logits / self.softcap)
                if (mask := self.visible.at(at, slice(bb, bb + 1))) is not None:
                    mask = mask[0, 0]
                    lowest = torch.finfo(torch.float32).min
                    logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask.double()
                out[bb, kk * group : (kk + 1) * group] = logits.softmax(-1) @ values
        return out.transpose(1, 2)


def agrees(found: Tensor, example: Example) -> bool:
    assert found.dtype == example.query.dtype
    return torch.allclose(found.double(), example.expected(), atol=TOLERANCE[found.dtype], rtol=TOLERANCE[found.dtype])


CASES = [
    *({"kinds": kinds, "width": width} for kinds in KINDS for width in (64, 96, 128, 256)),
    *({"kinds": kinds, "dtype": dtype} for kinds in KINDS for dtype in (torch.bfloat16, torch.float16)),
    *({"kinds": kinds, "lengths": "ragged", "dtype": dtype} for kinds in KINDS for dtype in TOLERANCE),
    *({"width": width, "dtype": dtype, "new": 2} for width in (2, 9, 33, 80) for dtype in TOLERANCE),
    *({"kinds": "dd", "width": width} for width in (2, 9, 33, 80)),
    # more queries than sums that fit into registers, in groups and in tokens
    *({"group": group, "new": new, "dtype": t} for group in (1, 2, 4, 6, 8) for new in (1, 3) for t in TOLERANCE),
    *({"mask": mask, "lengths": "ragged", "new": new} for mask in ("padding", "unseen", "added") for new in (1, 3)),
    *({"mask": mask, "dtype": torch.bfloat16, "new": 3} for mask in ("padding", "unseen", "added", "nothing")),
    *({"kinds": kinds, "cap": 5.0, "dtype": dtype} for kinds in ("bb", "dd") for dtype in TOLERANCE),
]


def name_of(case) -> str:
    return "-".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in case.items())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_compiled_kernel_is_the_dense_softmax(case):
    example = Example(**case)
    assert kernels.kernel_for(example.problem) is cpu.attend
    assert agrees(cpu.attend(example.problem), example)


def test_threads_share_the_work():
    example, before = Example(lengths="ragged", group=2), torch.get_num_threads()
    alone = cpu.attend(example.problem)
    try:
        torch.set_num_threads(3)
        assert torch.allclose(cpu.attend(example.problem), alone, atol=1e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("flags", [("-mavx2", "-mfma", "-mf16c"), ()], ids=" ".join)
def test_processors_without_the_newest_instructions(flags, monkeypatch):
    """Compiled for older processors than this one, where it knows their instructions."""
    if not all(f" {flag[2:]} " in processor() for flag in flags):
        pytest.skip("this processor hasn't got these instructions")
    library = compiler.compiled((("-O1", *flags),))  # which takes less time
    for name in ("argtypes", "restype"):
        setattr(library.attend, name, getattr(cpu.library().attend, name))
    library.built_for.restype = cpu.library().built_for.restype
    assert library.built_for() == (b"AVX2" if flags else b"any processor")
    monkeypatch.setattr(cpu, "library", lambda: library)
    for dtype, kinds in itertools.product(TOLERANCE, ("bb", "dd")):
        for case in ({}, {"lengths": "ragged", "new": 3, "width": 33}):
            example = Example(kinds=kinds, dtype=dtype, **case)
            assert agrees(cpu.attend(example.problem), example)


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf8") as file:
            return next(f" {line} " for line in file if line.startswith("flags"))
    except (OSError, StopIteration):
        return ""


def test_values_at_the_end_of_memory_are_not_read_beyond():
    # a page that ends where the elements end would be needed to see it; here the sums would change
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    padded = torch.full((64 * 64 + 64,), float("nan"))
    padded[: 64 * 64] = x.flatten()
    rows = BitmapRows.encode(x, torch.tensor([64]), "token")
    values = BitmapRows.encode(x, torch.tensor([64]), "channel")
    store = Store(torch.tensor([[64]]), rows, values)
    tail, query = torch.zeros(1, 1, 0, 64), torch.randn(1, 1, 1, 64)
    problem = Problem(query, (store, Rectangle(tail, tail, torch.zeros(1, 1, 0))), None, False, 64, 0.125, None)
    expected = (query[0, 0] @ x.mT * 0.125).softmax(-1) @ x
    assert torch.allclose(cpu.attend(problem)[0, 0], expected, atol=1e-5)


# -- what is chosen ----------------------------------------------------------------------------------------------------


@pytest.fixture
def forgetful():
    """What was said and found before is not remembered."""
    caches = (kernels._fall_back, kernels._of_device, cpu.library)
    for known in caches:
        known.cache_clear()
    yield
    for known in caches:
        known.cache_clear()


def test_without_a_compiler_plain_torch_does_it_and_says_so_once(forgetful, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    example = Example()
    with pytest.warns(
        UserWarning, match=r"plain torch, which is slower: .* no C\+\+ compiler was found .*no-such"
    ) as said:
        found = [attention(example) for _ in range(2)]
    assert len(said) == 1 and agrees(found[0], example) and torch.equal(*found)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(compiler.CompilationError, match=r"looked for c\+\+, g\+\+, clang\+\+"):
        compiler.compiled()


def test_a_compiler_that_fails_is_quoted(forgetful, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'sorry: not today' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    with pytest.raises(compiler.CompilationError, match="broken failed: sorry: not today"):
        compiler.compiled()
    assert not list((tmp_path / "cache" / "kernels").iterdir())


def test_it_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    made = []
    real = compiler._compile

    def counted(command, processors, target):
        made.append(target)
        target.parent.mkdir(parents=True)
        target.write_bytes(b"not a library")

    monkeypatch.setattr(compiler, "_compile", counted)
    for _ in range(2):
        with pytest.raises(compiler.CompilationError, match="cache-"):
            compiler.compiled()
    assert len(made) == 1 and real is not counted and made[0].parent == tmp_path / "kernels"


def attention(example: Example) -> Tensor:
    visible, tail = example.visible, example.tail
    return mixed_attention(
        example.query, example.store, tail, example.tail_positions, visible, example.scaling, example.softcap
    )


def test_what_no_kernel_takes_goes_through_torch(forgetful, monkeypatch):
    cases = [
        (Example(width=320), "heads of 320 channels"),
        (Example(dtype=torch.float64), "float64"),
    ]
    for example, why in cases:
        with pytest.warns(UserWarning, match=f"no kernel for {why}"):
            assert kernels.kernel_for(example.problem) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.kernel_for(example.problem) is None
    with pytest.warns(UserWarning, match="no kernel for xpu"):
        assert kernels._of_device("xpu") is None
    # for many tokens and gradients the reference is the right one, so that nothing is said
    assert kernels.kernel_for(Example(new=kernels.MOST_TOKENS + 1).problem) is None
    trained = Example()
    trained.query.requires_grad_()
    assert kernels.kernel_for(trained.problem) is None
    monkeypatch.setenv(kernels.SWITCH, "torch")
    assert kernels.kernel_for(Example().problem) is None
    monkeypatch.setenv(kernels.SWITCH, "fast")
    with pytest.raises(UsageError, match="SECATEUR_KERNELS must be auto or torch, got 'fast'"):
        kernels.kernel_for(Example().problem)


# -- in a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "think:0.5,recent=4",
        "mustafar:0.5,window=4,block=4",
        "adakv(knorm:0.5)",
        "adakv(knorm:0.5)+mustafar:0.5,window=2,block=2",
        # heads grow to different lengths while decoding
        "kvzap:surrogate={surrogate},threshold=0,window=4,decoding=true",
    ],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_generation_is_that_of_the_reference(spec, padding, monkeypatch):
    model, ids = make_tiny("llama"), tiny_ids(windows=2, length=24)
    spec = spec.format(surrogate=random_surrogate())
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    called = []
    monkeypatch.setattr(cpu, "attend", lambda problem, real=cpu.attend: called.append(1) or real(problem))
    kernels._of_device.cache_clear()
    cache = sc.compressed_cache(spec, model)
    found = generate(model, ids, mask, cache=cache)
    kernels._of_device.cache_clear()
    assert all(layer.store.is_ragged == spec.startswith(("adakv", "kvzap")) for layer in cache.layers)
    assert len(called) == 5 * 3  # new tokens behind the first, layers
    monkeypatch.setenv(kernels.SWITCH, "torch")
    expected = generate(model, ids, mask, cache=sc.compressed_cache(spec, model))
    assert len(called) == 15
    assert torch.equal(found.tokens, expected.tokens) and torch.allclose(found.logits, expected.logits, atol=1e-4)


# -- Triton ------------------------------------------------------------------------------------------------------------

TRITON_CASES = [
    {"kinds": "dd", "width": 96, "dtype": torch.float16, "lengths": "ragged", "mask": "padding", "new": 2},
    {"kinds": "td", "mask": "added"},
    {"kinds": "dt", "width": 33, "dtype": torch.bfloat16, "mask": "unseen", "group": 1},
    {"kinds": "bb", "width": 96, "dtype": torch.float16, "lengths": "ragged", "mask": "padding", "new": 2},
    {"kinds": "bb", "width": 128, "dtype": torch.bfloat16, "lengths": "ragged", "cap": 5.0},
    {"kinds": "bd", "width": 256, "mask": "nothing", "group": 1},
    {"kinds": "db", "width": 8, "mask": "added", "new": 2, "dtype": torch.bfloat16},
]


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="runs in a process of its own, below")
@pytest.mark.parametrize("case", TRITON_CASES, ids=name_of)
def test_the_triton_kernel_is_the_dense_softmax(case):
    from secateur.cache.kernels import gpu

    example = Example(**case)
    assert agrees(gpu.attend(example.problem), example)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="it starts this file again")
def test_the_triton_kernel_in_its_interpreter():
    """Triton reads the environment when it is imported."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "triton_kernel_is",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{len(TRITON_CASES)} passed" in done.stdout
