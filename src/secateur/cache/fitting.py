"""Surrogates of KVzip's scores for ``kvzap``: what is collected of a model's texts, and what is fitted to it.

Every text is read by the model, and once more behind the request to repeat it. Of some of its tokens, drawn at random,
the input of the attention and the logarithm of KVzip+'s score are kept, text by text, in a folder beside the output: a
fit that was stopped goes on behind the last text. The networks are fitted to all texts but the last ones, which say how
well they predict.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.cache.compressed import CompressedCache
from secateur.cache.hooks import Call, decoder_of
from secateur.cache.layer import CompressedLayer, Steps
from secateur.cache.rereading import reread_scores
from secateur.drawing import seeded
from secateur.errors import DataError, NonFiniteError, OutputError, UsageError
from secateur.files import output_file, output_folder
from secateur.finite import all_finite
from secateur.methods import make_method
from secateur.methods.caching import RereadMethod
from secateur.methods.rereading import opening
from secateur.methods.surrogates import CONFIG, WEIGHTS, Surrogate
from secateur.models.fingerprint import memory_fingerprint
from secateur.observe.calibration import start_token
from secateur.options import check_options, option
from secateur.reading import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shapes: N windows, T tokens of a window, R rows (tokens that were drawn), D hidden size, K key-value heads, M neurons.

REPORT = "fit.json"
QUANTILES = (0.25, 0.5, 0.75, 0.9)
_LOWEST = 1e-10
"""attention below this counts as this: what underflows has no logarithm"""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How surrogates are fitted; defaults of KVzap."""

    kind: str = option("linear", "linear, or mlp with a hidden layer", choices=("linear", "mlp"))
    rows: int = option(500, "tokens that are drawn of every text", unit="tokens", ge=1)
    alpha: float = option(1.0, "ridge penalty of the linear surrogate", ge=0)
    neurons: int = option(512, "hidden neurons of the mlp", ge=1)
    epochs: int = option(15, "passes of the mlp over all rows", ge=1)
    learning_rate: float = option(5e-3, "learning rate of AdamW for the mlp, which falls along a cosine", gt=0)
    batch: int = option(512, "rows of a step of the mlp", unit="tokens", ge=1)
    seed: int = option(0, "seed of what is drawn")

    def __post_init__(self) -> None:
        check_options(self, "cache fit")


@dataclass
class Ridge:
    """Sums of rows, from which a linear map with an intercept follows; those of two parts of the data add up."""

    count: int = 0
    x_D: Tensor | float = 0.0
    y_K: Tensor | float = 0.0
    gram_DD: Tensor | float = 0.0
    cross_DK: Tensor | float = 0.0

    def update(self, x_RD: Tensor, y_RK: Tensor) -> None:
        """Add rows."""
        x, y = x_RD.double(), y_RK.double()
        more = Ridge(len(x), x.sum(dim=0), y.sum(dim=0), x.mT @ x, x.mT @ y)
        self.merge(more)

    def merge(self, other: Ridge) -> None:
        """Add the rows of another part of the data."""
        for name in ("count", "x_D", "y_K", "gram_DD", "cross_DK"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def solve(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Weight [K, D] and bias [K], float32: least squares with ``alpha`` times the squared weights on top."""
        x, y = torch.as_tensor(self.x_D) / self.count, torch.as_tensor(self.y_K) / self.count
        gram = torch.as_tensor(self.gram_DD) - self.count * x[:, None] * x
        cross = torch.as_tensor(self.cross_DK) - self.count * x[:, None] * y
        gram = gram + alpha * torch.eye(len(x), dtype=gram.dtype)
        # the smallest solution where rows leave directions open
        weight_DK = torch.linalg.lstsq(gram, cross, driver="gelsd").solution
        return weight_DK.mT.float(), (y - x @ weight_DK).float()


@dataclass
class Fit:
    """A fitted surrogate: R² of the log scores of texts that it wasn't fitted to, [layers][heads], and the thresholds
    below which a fraction of their tokens lies."""

    folder: Path
    r2: list[list[float]]
    thresholds: dict[float, float]
    texts: int
    held_out: int
    options: FitOptions = field(repr=False)

    @property
    def mean_r2(self) -> float:
        """The mean of R² over layers and heads."""
        flat = [value for row in self.r2 for value in row]
        return sum(flat) / len(flat)

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "folder": str(self.folder),
            "texts": self.texts,
            "held_out": self.held_out,
            "mean_r2": self.mean_r2,
            "r2": self.r2,
            "thresholds": {f"{share:g}": value for share, value in self.thresholds.items()},
            "options": asdict(self.options),
        }


class _Noting(CompressedLayer):
    """A dense layer that keeps the input of its attention."""

    hidden: Tensor | None = None

    def attend(self, query: Tensor, mask: Tensor | None, call: Call, **arguments: Any) -> tuple[Tensor, Tensor | None]:
        self.hidden = call.hidden()
        return super().attend(query, mask, call, **arguments)


def collect(model: PreTrainedModel, tokenizer: Any, window_T: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of every layer with full attention: the inputs of its attention [T, D], and the log scores [T, K] float32."""
    before = torch.tensor(opening(tokenizer) or start_token(tokenizer), dtype=window_T.dtype)
    ids = torch.cat([before, window_T.cpu()]).to(model.device)
    cache = CompressedCache((), model, tokenizer)
    cache.layers = [
        _Noting(layer.index, layer.layers, Steps()) if isinstance(layer, CompressedLayer) else layer
        for layer in cache.layers
    ]
    decoder = decoder_of(model)
    with torch.no_grad():
        decoder(input_ids=ids[None], use_cache=True, **{cache.argument: cache})
    method = make_method("kvzip", {"plus": True, "sinks": len(before), "chunk": len(window_T)})
    assert isinstance(method, RereadMethod)
    scores = reread_scores(cache, decoder, method, (0, 0), ids)
    inputs = [layer.hidden for layer in cache.layers if isinstance(layer, _Noting)]
    hidden = [h[0, len(before) :] for h in inputs if h is not None]
    if len(hidden) != len(scores):
        raise UsageError("the attention of this model isn't called with its hidden states, which a surrogate reads")
    return hidden, [score[:, len(before) :].clamp(min=_LOWEST).log().mT for score in scores]


def fit_surrogate(
    model: PreTrainedModel,
    tokenizer: Any,
    windows_NT: Tensor,
    folder: str | Path,
    options: FitOptions | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Fit:
    """Fit a surrogate of KVzip+'s scores to windows of tokens [N, T] int64, and write it for ``kvzap``.

    What the tokenizer puts before a text isn't part of them. Official: texts of 750 to 1250 tokens. Raises DataError
    for fewer than two windows, UsageError for more rows than tokens, OutputError for an output that exists or a fit
    that was stopped (unless ``resume`` or ``overwrite``).
    """
    options = options or FitOptions()
    folder, say = Path(folder), progress or (lambda *_: None)
    if len(windows_NT) < 2:
        raise DataError(f"a surrogate is fitted to some texts and tried on others: at least 2, got {len(windows_NT)}")
    if options.rows > windows_NT.shape[1]:
        raise UsageError(
            f"cache fit: rows must be at most the {windows_NT.shape[1]} tokens of a text, got {options.rows}"
        )
    held_out = max(1, len(windows_NT) // 20)
    setting = {
        "model": memory_fingerprint(model).model_dump(),
        "rows": options.rows,
        "seed": options.seed,
        "windows": windows_NT.tolist(),
    }
    with output_folder(folder, overwrite) as temporary:
        work = _open_work(folder, setting, resume, overwrite)
        _collect_all(model, tokenizer, windows_NT, options, work, say)
        surrogate, r2, thresholds = _fit_all(model, work, len(windows_NT), held_out, options, say)
        fit = Fit(folder, r2, thresholds, len(windows_NT) - held_out, held_out, options)
        (temporary / CONFIG).write_text(json.dumps(surrogate.config(), indent=2) + "\n", encoding="utf8")
        save_file(surrogate.tensors(), temporary / WEIGHTS, metadata={"format": "pt"})
        about = {"model": setting["model"], **fit.document()}
        (temporary / REPORT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf8")
    shutil.rmtree(work, ignore_errors=True)
    return fit


def _open_work(folder: Path, setting: dict[str, Any], resume: bool, overwrite: bool) -> Path:
    """The folder in which rows are kept until the fit is finished. Raises OutputError."""
    work = folder.with_name(f".{folder.name}.rows")
    if work.exists() and not (resume or overwrite):
        raise OutputError(f"a fit of {folder} was stopped: pass --resume to go on, or --overwrite to begin again")
    if work.exists() and not resume:
        shutil.rmtree(work)
    if not work.exists():
        work.mkdir(parents=True)
        with output_file(work / "setting.json") as temporary:
            temporary.write_text(json.dumps(setting), encoding="utf8")
    elif read_json(work / "setting.json", OutputError) != json.loads(json.dumps(setting)):
        raise OutputError(f"the fit of {folder} that was stopped had another model, text or rows: pass --overwrite")
    return work


def _collect_all(model: Any, tokenizer: Any, windows_NT: Tensor, options: FitOptions, work: Path, say: Any) -> None:
    for number, window in enumerate(windows_NT):
        say("reading", number, len(windows_NT))
        if _rows_file(work, number).exists():
            continue
        hidden, scores = collect(model, tokenizer, window)
        generator = torch.Generator().manual_seed(options.seed * len(windows_NT) + number)
        drawn = torch.randperm(len(window), generator=generator)[: options.rows]
        kept = {f"hidden.{n}": h.cpu()[drawn].contiguous() for n, h in enumerate(hidden)}
        kept |= {f"score.{n}": s.cpu()[drawn].contiguous() for n, s in enumerate(scores)}
        for name, rows in kept.items():
            if not all_finite(rows):
                raise NonFiniteError(f"{name} of text {number} holds NaN or inf: try --dtype float32")
        with output_file(_rows_file(work, number)) as temporary:
            save_file(kept, temporary)
    say("reading", len(windows_NT), len(windows_NT))


def _rows_file(work: Path, number: int) -> Path:
    return work / f"text-{number:05d}.safetensors"


def _rows_of(work: Path, layer: int, numbers: range) -> Iterator[tuple[Tensor, Tensor]]:
    for number in numbers:
        rows = load_file(_rows_file(work, number))
        yield rows[f"hidden.{layer}"].float(), rows[f"score.{layer}"]


def _fit_all(
    model: Any, work: Path, count: int, held_out: int, options: FitOptions, say: Any
) -> tuple[Surrogate, list[list[float]], dict[float, float]]:
    cache = CompressedCache((), model)
    full = [index for index, layer in enumerate(cache.layers) if isinstance(layer, CompressedLayer)]
    fitted: dict[int, Any] = {}
    r2, predictions = [], []
    for n, index in enumerate(full):
        say("fitting", n, len(full))
        known, unknown = _rows_of(work, n, range(count - held_out)), _rows_of(work, n, range(count - held_out, count))
        layer = _fit_ridge(known, options) if options.kind == "linear" else _fit_mlp(known, options)
        fitted[index] = layer
        x, y = (torch.cat(parts) for parts in zip(*unknown, strict=True))
        predicted = Surrogate((layer,)).scores(0, 1, x[None], y.shape[1])[0].mT
        spread = (y - y.mean(dim=0)).square().sum(dim=0).clamp(min=1e-12)
        r2.append((1 - (y - predicted).square().sum(dim=0) / spread).tolist())
        predictions.append(predicted.flatten())
    say("fitting", len(full), len(full))
    # layers with a sliding window aren't asked
    blank = tuple((torch.zeros_like(w), torch.zeros_like(b)) for w, b in fitted[full[0]])
    surrogate = Surrogate(tuple(fitted.get(index, blank) for index in range(len(cache.layers))))
    ordered = torch.cat(predictions).sort().values
    thresholds = {share: float(ordered[int(share * (len(ordered) - 1))]) for share in QUANTILES}
    return surrogate, r2, thresholds


def _fit_ridge(rows: Iterator[tuple[Tensor, Tensor]], options: FitOptions) -> tuple[tuple[Tensor, Tensor], ...]:
    ridge = Ridge()
    for x, y in rows:
        ridge.update(x, y)
    return (ridge.solve(options.alpha),)


def _fit_mlp(rows: Iterator[tuple[Tensor, Tensor]], options: FitOptions) -> tuple[tuple[Tensor, Tensor], ...]:
    """AdamW on the squared error, gradients clipped to 1; every layer by itself (official: all of them in one loss)."""
    x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
    with seeded(options.seed):
        first, last = nn.Linear(x.shape[1], options.neurons), nn.Linear(options.neurons, y.shape[1])
        net = nn.Sequential(first, nn.GELU(), last)
        optimizer = torch.optim.AdamW(net.parameters(), lr=options.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs)
        for _ in range(options.epochs):
            for part in torch.randperm(len(x)).split(options.batch):
                loss = (net(x[part]) - y[part]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
            schedule.step()
    return tuple((step.weight.detach().clone(), step.bias.detach().clone()) for step in (first, last))
