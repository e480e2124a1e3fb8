import json

import pytest

from secateur.healing.recovery import RecoveryOptions
from secateur.methods import describe, list_methods
from secateur.methods.descriptor import DESCRIPTOR_VALUES
from secateur.options import describe_options

PLUGIN = '''
"""Coin: keep what the coin says."""
from dataclasses import dataclass
from typing import ClassVar
import torch
import secateur
from secateur.allocate import PerMatrix
from secateur.methods import Descriptor, WeightMethod, option


@secateur.register("{name}")
@dataclass(frozen=True, kw_only=True)
class Coin(WeightMethod):
    """Options of the coin."""

    bias: float = option(0.5, "how the coin falls", ge=0, le=1)
    descriptor: ClassVar = Descriptor(
        object="weights", granularity="element", score="random", allocation="uniform", data="none", speedup="none"
    )

    def score(self, target, seen):
        return torch.ones_like(target.weight)

    def rule(self):
        return PerMatrix(self.sparsity)
'''


def test_allocators_are_listed_and_explained(cli):
    from secateur.allocators import list_allocators

    assert [one["name"] for one in json.loads(cli("allocators", "--json").out)] == list(list_allocators())
    assert all(name in cli("allocators").out for name in list_allocators())
    shown = cli("allocators", "owl").out
    assert "lam_pattern" in shown and "2310.05175" in shown
    assert json.loads(cli("allocators", "erk", "--json").out)["options"]["power"]["default"] == 1.0
    assert cli("allocators", "owll").code == 2


def test_methods_are_those_of_the_registry(cli):
    listed = json.loads(cli("methods", "--json").out)
    assert [method["name"] for method in listed] == list_methods()
    shown = cli("methods").out
    assert all(name in shown for name in list_methods())


def test_methods_by_object(cli):
    names = [method["name"] for method in json.loads(cli("methods", "--object", "layers", "--json").out)]
    assert names == list_methods(object="layers") and "shortgpt" in names
    run = cli("methods", "--object", "layer")
    assert run.code == 2 and "did you mean 'layers'?" in run.err


def test_help_names_all_that_methods_cut(cli):
    said = cli("methods", "--help").out
    assert [kind for kind in DESCRIPTOR_VALUES["object"] if kind not in said] == []


def test_help_of_heal_names_every_option(cli):
    said = cli("heal", "--help").out
    # what stages tell each other is nobody's to set
    assert [name for name in describe_options(RecoveryOptions) if name not in said] == ["done", "total"]


def test_describe_lists_every_option(cli):
    assert json.loads(cli("describe", "flap", "--json").out) == json.loads(json.dumps(describe("flap")))
    shown = cli("describe", "flap").out
    assert all(name in shown for name in describe("flap")["options"])


def test_describe_of_an_unknown_method(cli):
    run = cli("describe", "flpa")
    assert (run.code, run.out) == (2, "") and "did you mean 'flap'?" in run.err


@pytest.mark.parametrize("placed", ["before", "after"])
def test_a_plugin_file_appears(cli, tmp_path, forget_plugins, placed):
    name = f"coin_{placed}"
    plugin = tmp_path / f"{name}.py"
    plugin.write_text(PLUGIN.replace("{name}", name))
    option, command = ["--plugin", plugin], ["describe", name]
    run = cli(*option, *command) if placed == "before" else cli(*command, *option)
    assert run.code == 0, run.err
    assert "how the coin falls" in run.out
    assert name in cli("methods").out


def test_a_plugin_prunes(cli, tmp_path, forget_plugins, tiny_checkpoint):
    plugin = tmp_path / "coin_prune.py"
    plugin.write_text(PLUGIN.replace("{name}", "coin_prune"))
    run = cli("prune", tiny_checkpoint, "--method", "coin_prune", "--plugin", plugin, "--dry-run", "--json")
    assert run.code == 0, run.err
    assert json.loads(run.out)["plans"][0]["masks"]
