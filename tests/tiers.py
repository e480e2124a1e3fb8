"""What ``make test`` leaves to ``make test-all``: slow tests, each with a small one beside it that guards the same law.

A test may carry the mark itself, with the name of the small one: ``@pytest.mark.slow("test_x")``.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import pytest

SLOW = {
    "tests/cache/test_kernels.py::test_the_triton_kernel_in_its_interpreter": (
        "test_the_compiled_kernel_is_the_dense_softmax"
    ),
    "tests/cli/test_process.py::test_streams_of_a_real_run": "test_a_reader_that_leaves_is_no_error",
    "tests/comparison/test_run.py::test_two_workers_give_what_one_gives": (
        "test_it_goes_on_after_an_interrupt_with_the_same_result"
    ),
    "tests/healing/test_refit.py::test_every_weight_method_can_be_refitted_and_gains": (
        "test_a_refit_solves_for_what_the_mask_keeps"
    ),
    "tests/models/test_hub.py::test_a_process_finds_the_hub_by_its_environment": (
        "test_the_token_comes_from_the_environment"
    ),
    "tests/runs/test_healing.py::test_a_sharded_training_goes_on_to_the_bit": "test_two_ranks_train_like_one",
    "tests/runs/test_ranks.py::test_a_rank_that_is_killed_ends_the_run_which_goes_on_later": (
        "test_a_stopped_run_goes_on_with_as_many_ranks_and_gives_the_same_bytes"
    ),
    "tests/runtimes/test_onnx.py::test_onnxruntime_agrees": "test_what_disagrees_is_not_kept",
    "tests/sweep/test_curve.py::test_a_prediction_holds_against_full_runs": (
        "test_a_prediction_meets_what_was_run_and_stays_between_it"
    ),
    "tests/sweep/test_ray.py::test_a_killed_worker_loses_no_point": (
        "tests/cli/test_sweep.py::test_an_interrupted_sweep_says_how_to_go_on"
    ),
    "tests/test_benchmarks.py::test_structured_methods_are_compared_and_go_on": (
        "tests/comparison/test_run.py::test_it_goes_on_after_an_interrupt_with_the_same_result"
    ),
    "tests/test_docs.py::test_the_example_method_passes_the_conformance_tests": (
        "test_the_example_method_appears_in_the_list_and_the_docs_table"
    ),
    "tests/test_end_to_end.py::test_structured_order_at_a_fifth": "test_a_small_cut_costs_little",
    "tests/test_end_to_end.py::test_unstructured_order_at_half": "test_a_small_cut_costs_little",
    "tests/test_memory.py::test_tensors_of_some_megabytes_get_the_pages_of_those_before": (
        "test_holes_between_tensors_are_given_back"
    ),
    "tests/train/test_callbacks.py::test_a_trainer_goes_on_to_the_bit": "test_lightning_goes_on_to_the_bit",
    "tests/train/test_callbacks.py::test_a_trainer_prunes_before_training_by_its_own_batches": (
        "test_lightning_goes_on_to_the_bit"
    ),
}
"""Slow tests, and the small test that guards the same; it stands in their own file where only a function is named."""

GUIDES = ["README.md", "CONTRIBUTING.md", "docs/guides/prune-your-first-model.md", "docs/guides/trust.md"]
TWO = ["*-llama", "*-gpt2"]

VOLUME = {
    "tests/cli/test_sweep.py::test_an_interrupted_sweep_says_how_to_go_on": ["1"],
    "tests/conformance/test_channel_methods.py::test_masked_module_equals_cut_module": [
        "*spa_l1*",
        "*taylor*",
        "*obspa*",
    ],
    "tests/conformance/test_channel_methods.py::test_same_arguments_give_the_same_bytes_and_leave_the_module_alone": [
        "spa_l1",
        "spa_snip",
        "fpgm",
        "obspa",
        "hrank",
    ],
    "tests/conformance/test_checkpoints.py::test_saved_model_gives_the_logits_of_the_one_in_memory": [
        "*llama*",
        "*gpt2*",
    ],
    "tests/conformance/test_fitted_networks.py::test_random_networks": ["[0-4]"],
    "tests/conformance/test_methods.py::test_cut_models_generate_with_the_cache_as_without": TWO,
    "tests/conformance/test_methods.py::test_masked_model_equals_cut_model_on_every_family": TWO,
    "tests/conformance/test_methods.py::test_query_heads_leave_every_key_value_group_alike": TWO,
    "tests/conformance/test_methods.py::test_weight_methods_reach_their_sparsity_in_every_matrix": TWO,
    "tests/runs/test_ranks.py::test_both_launchers_work_and_one_rank_speaks": ["torchrun*"],
    "tests/runs/test_resume.py::test_a_crash_before_any_line_of_the_journal": [
        "magnitude*",
        "sparsegpt*",
        "flap*",
        "refit*",
    ],
    "tests/runs/test_streaming.py::test_streamed_equals_in_memory": ["*llama*", "*gpt2*"],
    "tests/structure/test_random_networks.py::test_cut_equals_masked": ["[0-7]"],
    "tests/test_docs.py::test_examples_run": [*GUIDES, "docs/guides/add-a-method.md", "docs/methods/*", "docs/*.md"],
    "tests/test_gpu.py::test_checkpoints": ["magnitude*", "flap*"],
    "tests/test_gpu.py::test_decoders": ["wanda", "sparsegpt", "flap", "osscar", "shortgpt", "magnitude"],
    "tests/test_gpu.py::test_modules": ["spa_l1", "taylor", "obspa", "hrank"],
    "tests/train/test_sharding.py::test_a_cut_model_with_masks_keeps_its_widths_to_the_bit": ["llama"],
}
"""Tests of many cases, by the patterns of the cases that ``make test`` runs; these guard what the others do."""


def function_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def case_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[2].removesuffix("]")


def mark_slow(items: Iterable[pytest.Item]) -> None:
    """Mark the tests of both tables."""
    for item in items:
        function = function_of(item)
        if function in SLOW:
            item.add_marker(pytest.mark.slow(SLOW[function]))
        elif function in VOLUME and not _stays(item, VOLUME[function]):
            item.add_marker(pytest.mark.slow(function))


def _stays(item: pytest.Item, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(case_of(item), pattern) for pattern in patterns)


def wrong(items: Iterable[pytest.Item]) -> list[str]:
    """What is wrong with the tiers of these tests: a slow one without a small one, or a table that nothing matches.

    Only files of which tests are among ``items`` are looked at.
    """
    slow = {item.nodeid: item.get_closest_marker("slow") for item in items}
    small = {function_of(item) for item in items if slow[item.nodeid] is None}
    files = {item.nodeid.partition("::")[0] for item in items}
    found = []
    for item in items:
        mark = slow[item.nodeid]
        if mark is None:
            continue
        if not mark.args:
            found.append(f"{item.nodeid} is slow and names no small test")
            continue
        here, name = item.nodeid.partition("::")[0], mark.args[0]
        name = name if name.startswith("tests/") else f"{here}::{name}"
        if name.partition("::")[0] in files and name not in small:
            found.append(f"{item.nodeid} names {name}, which is no test of the default tier")
    functions = {function_of(item) for item in items}
    found += [
        f"{name} is no test" for name in (*SLOW, *VOLUME) if name.partition("::")[0] in files and name not in functions
    ]
    return found
