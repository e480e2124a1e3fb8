"""What presses of NVIDIA kvpress give on tensors of another process; runs in kvpress' own environment.

    PEER/bin/python benchmarks/kvpress_peer.py FOLDER name,name

FOLDER holds a checkpoint and ``seen.tensors``; ``peer.tensors`` is written beside them. See ``against_kvpress.py``.
"""

import math
import sys

import kvpress
import torch
import transformers
from kvpress.utils import get_prerope_query_states
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half


def presses():
    snap = kvpress.SnapKVPress
    keydiff = kvpress.KeyDiffPress
    return {
        "decoding": kvpress.DecodingPress(keydiff(), target_size=150),
        "knorm": kvpress.KnormPress(0.5),
        "streaming_llm": kvpress.StreamingLLMPress(0.5),
        "observed_attention": kvpress.ObservedAttentionPress(0.5),
        "tova": kvpress.TOVAPress(0.5),
        "snapkv": snap(0.5),
        "pyramidkv": kvpress.PyramidKVPress(0.5),
        "keydiff": kvpress.KeyDiffPress(0.5),
        "expected_attention": kvpress.ExpectedAttentionPress(0.5),
        "lagkv": kvpress.LagKVPress(0.5, lag_size=32),
        "adakv": kvpress.AdaKVPress(snap(0.5)),
        "criticalkv": kvpress.CriticalKVPress(snap(0.5)),
        "chunkkv": kvpress.ChunkKVPress(snap(0.5)),
        "block": kvpress.BlockPress(kvpress.KeyDiffPress(0.5)),
        "key_rerotation": kvpress.KeyRerotationPress(kvpress.KeyDiffPress(0.5)),
        "think": kvpress.ThinKPress(0.5),
    }


def attentions(module, hidden, keys, cos, sin):
    """All attention probabilities, [1, H, S, S]: what the press reads from eager attention."""
    queries = get_prerope_query_states(module, hidden)
    queries = queries * cos[:, None] + rotate_half(queries) * sin[:, None]
    logits = queries @ repeat_kv(keys, module.num_key_value_groups).mT / math.sqrt(module.head_dim)
    ahead = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(ahead, float("-inf")).softmax(dim=-1)


class Requests:
    """A tokenizer that knows the requests to repeat a text, by the ids that were handed over."""

    chat_template = None

    def __init__(self, seen):
        self.seen = seen

    def encode(self, text, **arguments):
        name = "later" if "starting with" in text else "first" if "Repeat" in text else "answer"
        return self.seen[f"request.{name}"][None]


def kvzip(model, seen, plus, chunk):
    """Scores [L, K, S] and kept tokens, by the press' own passes; its context manager would look for a tokenizer."""
    press = kvpress.KVzipPress(0.5, n_sink=0, kvzip_plus_normalization=plus)
    press._context_ids, press._cache, requests = seen["ids"], transformers.DynamicCache(), Requests(seen)
    press.context_length, press._suffix_ids = seen["ids"].shape[1], requests.encode("")
    model(seen["ids"], past_key_values=press._cache)
    hooks = [b.self_attn.register_forward_hook(press.forward_hook, with_kwargs=True) for b in model.model.layers]
    for part, repeated in press.prepare(model, requests, chunk_size=chunk):
        press.end_idx = press.start_idx + part.shape[1]
        model(repeated, past_key_values=press._cache)
        press.start_idx = press.end_idx
    for hook in hooks:
        hook.remove()
    press.compress_post(model)
    kept = torch.ones_like(press.score_val, dtype=torch.uint8)
    for layer, block in enumerate(model.model.layers):
        kept[layer][block.self_attn.masked_key_indices] = 0
    return press.score_val, kept


def kvzap(model, seen, folder):
    """Scores and kept tokens of every layer by a surrogate in ``folder`` and a threshold."""
    surrogate = kvpress.KVzapPress()
    # transformers builds a config without arguments when it loads one, unless it is told that it can't
    kvpress.presses.kvzap_press.KVzapConfig.has_no_defaults_at_init = True
    surrogate.kvzap_model = kvpress.presses.kvzap_press.KVzapModel.from_pretrained(f"{folder}/surrogate")
    press = kvpress.DMSPress(surrogate, threshold=float(seen["threshold"]), sliding_window_size=128)
    cache = transformers.DynamicCache()
    for layer, block in enumerate(model.model.layers):
        keys, values, hidden = (seen[f"{side}.{layer}"] for side in ("keys", "values", "hidden"))
        cache.update(keys, values, layer)
        kwargs = {
            "hidden_states": hidden,
            "past_key_values": cache,
            "cache_position": torch.arange(keys.shape[2]),
        }
        block.self_attn.masked_key_indices = None
        press.forward_hook(block.self_attn, [], kwargs, [None, None])
        kept = torch.ones(keys.shape[:3], dtype=torch.uint8)
        if block.self_attn.masked_key_indices is not None:
            kept[tuple(block.self_attn.masked_key_indices)] = 0
        yield surrogate.score(block.self_attn, hidden, keys, values, None, kwargs), kept


def which(kept, whole):
    """Rows of ``whole`` [1, K, S, E] that ``kept`` [1, K, n, E] holds, as a mask [1, K, S]; no two keys are equal."""
    mask = torch.zeros(whole.shape[:3], dtype=torch.uint8)
    for head in range(whole.shape[1]):
        same = (kept[0, head, :, None] == whole[0, head]).all(dim=-1)
        mask[0, head, same.any(dim=0)] = 1
    return mask


def main(folder, names):
    transformers.utils.logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    seen, found = load_file(f"{folder}/seen.tensors"), {}
    for layer, block in enumerate(model.model.layers):
        module = block.self_attn
        module.rotary_emb = model.model.rotary_emb
        keys, values, hidden = (seen[f"{side}.{layer}"] for side in ("keys", "values", "hidden"))
        cos, sin = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        kwargs = {"position_embeddings": (cos, sin), "hidden_states": hidden}
        for name in names:
            press, key = presses()[name], f"{name}.{layer}"
            weights = attentions(module, hidden, keys, cos, sin) if name == "observed_attention" else None
            if hasattr(press, "score"):
                score = press.score(module, hidden, keys.clone(), values.clone(), weights, kwargs)
                found[f"{key}.score"] = score.float().contiguous()
            new_keys, _ = press.compress(module, hidden, keys.clone(), values.clone(), weights, kwargs)
            if name == "think":
                found[f"{key}.kept"] = (new_keys != 0).any(dim=2).to(torch.uint8)
            elif name == "adakv":
                kept = torch.ones(keys.shape[:3], dtype=torch.uint8)
                kept[module.masked_key_indices] = 0
                found[f"{key}.kept"] = kept
            elif name == "key_rerotation":
                found[f"{key}.keys"] = new_keys.contiguous()
                kept_keys, _ = press.press.compress(module, hidden, keys.clone(), values.clone(), weights, kwargs)
                found[f"{key}.kept"] = which(kept_keys, keys)
            else:
                found[f"{key}.kept"] = which(new_keys, keys)
    for name, plus, chunk in (("kvzip", False, 2048), ("kvzip_plus", True, 2048), ("kvzip_chunks", False, 150)):
        scores, kept = kvzip(model, seen, plus, chunk)
        for layer in range(len(scores)):
            found |= {
                f"{name}.{layer}.score": scores[layer].float().clone(),
                f"{name}.{layer}.kept": kept[layer].clone(),
            }
    for layer, (score, kept) in enumerate(kvzap(model, seen, folder)):
        found |= {f"kvzap.{layer}.score": score.float().contiguous(), f"kvzap.{layer}.kept": kept}
    save_file(found, f"{folder}/peer.tensors")
    from importlib.metadata import version

    print(f"kvpress={version('kvpress')} transformers={transformers.__version__} torch={torch.__version__}")


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1], sys.argv[2].split(","))
