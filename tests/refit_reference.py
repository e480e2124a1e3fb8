"""A second, plain implementation of the refit of single weights, and what it looks at."""

import torch

from families import tiny_ids

IDS = tiny_ids(windows=12, length=32)
DOUBLE = torch.float64


def inputs_of(model, names):
    """What modules read when the model reads the calibration tokens, [tokens, channels] each."""
    seen, handles = {}, []
    for name in names:

        def hook(module, args, name=name):
            seen[name] = args[0].detach().reshape(-1, args[0].shape[-1])

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return seen


def refitted(w_OI, keep_OI, x, y, damping=0.01):
    """Row by row by normal equations, damped towards the dense weight."""
    h = x.T @ x
    ridge = damping * h.diagonal().mean()
    out = torch.zeros_like(w_OI)
    for row, mask in enumerate(keep_OI):
        k = mask.nonzero().flatten()
        left = h[k][:, k] + ridge * torch.eye(len(k), dtype=DOUBLE)
        right = x[:, k].T @ y[:, row] + ridge * w_OI[row, k]
        # pulled towards the dense weight: of what is removed, the pull acts through nothing
        out[row, k] = torch.linalg.solve(left, right)
    return out
