import json


def test_groups_with_units_and_costs(cli, tiny_checkpoint):
    document = json.loads(cli("inspect", tiny_checkpoint, "--json").out)
    neurons = [group for group in document["groups"] if group["kind"] == "neuron"]
    assert [group["units"] for group in neurons] == [64, 64]
    # gate, up and down: three vectors of the hidden size 32
    assert neurons[0]["cost"]["params"] == 3 * 32
    assert document["num_layers"] == 2
    assert all(item["reason"] for item in document["frozen"])


def test_heads_are_single_when_asked_for(cli, tiny_checkpoint):
    for heads, kind, other in (("kv", "kv_head", "head"), ("query", "head", "kv_head")):
        groups = json.loads(cli("inspect", tiny_checkpoint, "--heads", heads, "--json").out)["groups"]
        kinds = [group["kind"] for group in groups]
        assert kinds.count(kind) == 2 and other not in kinds


def test_table_for_people(cli, tiny_checkpoint):
    run = cli("inspect", tiny_checkpoint)
    assert run.code == 0 and "neuron" in run.out and "llama" in run.out


def test_unknown_heads(cli):
    run = cli("inspect", "m", "--heads", "all")
    assert run.code == 2 and "kv or query" in run.err
