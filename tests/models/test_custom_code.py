"""Models whose classes come with their checkpoint, and are trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur as sc

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class MineConfig(LlamaConfig):
    model_type = "minellama"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def custom(tiny_checkpoint, tmp_path) -> Path:
    """A Llama under another name, which only its own code can load."""
    folder = tmp_path / "custom"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "modeling_mine.py").write_text(CODE, encoding="utf8")
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    names = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    config |= {"model_type": "minellama", "architectures": ["MineForCausalLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf8")
    return folder


def test_trusted_code_is_trusted_in_every_part_of_a_run(custom, cli, tmp_path):
    recipe = tmp_path / "recipe.json"
    lora = "lora:steps=1,batch=1,length=32,held_out=1"
    steps = [{"method": "magnitude", "sparsity": 0.3}, {"method": "wanda", "sparsity": 0.5, "heal": lora}]
    recipe.write_text(json.dumps({"steps": steps}), encoding="utf8")
    out = tmp_path / "out"
    asked = ["prune", custom, "--recipe", recipe, "--out", out, "--samples", 2, "--length", 32, "--quiet"]
    refused = cli(*asked)
    assert refused.code == 1 and "trust_remote_code" in refused.err
    done = cli(
        *asked, "--calibration", "self", "--evaluate", "perplexity:builtin", "--windows", 2, "--trust-remote-code"
    )
    assert done.code == 0, done.err
    stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(stock).__name__ == "MineForCausalLM"
    mine, _ = sc.load(out, trust_remote_code=True)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(stock.eval()(ids).logits, mine(ids).logits)
    folder = sc.save(mine, None, tmp_path / "saved")
    assert "AutoModelForCausalLM" in json.loads((Path(folder) / "config.json").read_text(encoding="utf8"))["auto_map"]
