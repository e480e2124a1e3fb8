"""A policy that keeps rows of weights, learnt from weights alone by how little their singular values change.

    logits  u = (W P^T + b) v,   alpha = sigmoid(u)          W [rows, inputs]; P [rows, inputs], b [rows], v [rows, 1]
    keep    = sigmoid( log eps - log(1 - eps) + log alpha - log(1 - alpha) ),   eps ~ U(0, 1)     (binary concrete)
    action    k rows, drawn without replacement with the weights `keep`
    reward  R_l = 1 / D_l,  D_l the Kolmogorov-Smirnov distance of the singular values of W_l and of the rows that stay
    return  G_l = discount^l R_l
    loss      - ( sum over rows that stay of log keep ) * G_l, with a new eps

All matrices share one policy. Source: PruneNet, arXiv:2501.15296, and its official code.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.errors import NonFiniteError

UNCHANGED = 99999.0
"""The reward where no singular value has moved."""

_CLAMP = 1e-6
# of the package: one step for all matrices, with gradients no longer than this
_LONGEST = 1.0

Matrix = Callable[[], Tensor]
"""Gives a weight, [rows, inputs] float32, when it is its turn."""


@dataclass(frozen=True)
class Episodes:
    """How a policy is learnt. ``update`` is per_layer or per_episode; ``divergence`` is off, official or exact."""

    episodes: int = 20
    rate: float = 1e-3
    discount: float = 0.99
    update: str = "per_layer"
    divergence: str = "off"
    seed: int = 42


@dataclass(frozen=True)
class Policy:
    """``weight`` is P, ``bias`` b and ``vector`` v, float32."""

    weight: Tensor
    bias: Tensor
    vector: Tensor

    @classmethod
    def begin(cls, rows: int, inputs: int, seed: int) -> Policy:
        """As torch initialises a linear layer, and v from U(0, 1)."""
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(inputs)
        weight = (2 * torch.rand(rows, inputs, generator=generator) - 1) * bound
        bias = (2 * torch.rand(rows, generator=generator) - 1) * bound
        return cls(weight, bias, torch.rand(rows, 1, generator=generator))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Policy:
        """The policy that ``tensors`` gave."""
        return cls(tensors["weight"].float(), tensors["bias"].float(), tensors["vector"].float())

    def tensors(self) -> dict[str, Tensor]:
        """By name; a copy."""
        return {name: getattr(self, name).detach().clone() for name in ("weight", "bias", "vector")}

    def logits(self, w_RI: Tensor) -> Tensor:
        """[rows]. Without anything between them the two layers are one, and W P^T is never made."""
        probe_I = (self.weight.T @ self.vector).flatten()
        return w_RI.to(probe_I.device) @ probe_I + self.bias @ self.vector.flatten()

    def shares(self, w_RI: Tensor) -> Tensor:
        """alpha, [rows] in (0, 1)."""
        return self.logits(w_RI).sigmoid().clamp(_CLAMP, 1 - _CLAMP)

    def keep(self, w_RI: Tensor, eps_R: Tensor) -> Tensor:
        """The weight with which a row is drawn, [rows] in (0, 1)."""
        return concrete(self.shares(w_RI), eps_R)


def concrete(alpha_R: Tensor, eps_R: Tensor) -> Tensor:
    """A sample of the binary concrete distribution at temperature 1."""
    return (eps_R.clamp(_CLAMP, 1 - _CLAMP).logit() + alpha_R.logit()).sigmoid()


def draw_order(keep_R: Tensor, uniform_R: Tensor) -> Tensor:
    """Keys whose k largest are k rows drawn without replacement with these weights, whatever k is.

    An exponential race: the same distribution as drawing row after row (Efraimidis and Spirakis 2006).
    """
    return keep_R / -uniform_R.clamp(1e-12, 1 - 1e-7).log()


def distance(first: Tensor, second: Tensor) -> float:
    """The two-sample Kolmogorov-Smirnov statistic: the largest distance of the two distribution functions."""
    a, b = first.double().sort().values, second.double().sort().values
    both = torch.cat([a, b])
    below = [torch.searchsorted(one, both, right=True).double() / len(one) for one in (a, b)]
    return float((below[0] - below[1]).abs().max())


def reward(original: Tensor, left: Tensor) -> float:
    """1 / D of two lists of singular values."""
    found = distance(original, left)
    return 1 / found if found > 0 else UNCHANGED


def returns(rewards: Sequence[float], discount: float) -> list[float]:
    """Each reward with the discount of its place; they aren't added up, as in the official code."""
    return [discount**layer * one for layer, one in enumerate(rewards)]


def divergence(alpha_R: Tensor, kind: str) -> Tensor:
    """KL(Bernoulli(alpha) || Bernoulli(1/2)) summed over rows; ``official`` is what the published code has for it."""
    other = 1 - alpha_R
    if kind == "exact":
        return (alpha_R * alpha_R.log() + other * other.log() + math.log(2)).sum()
    return (-other * alpha_R.log() - alpha_R * other.log() - math.log(2)).sum()


class PolicySearch:
    """Learns a policy on ``matrices``, all of one shape, of which ``kept`` rows stay; episode by episode."""

    def __init__(self, matrices: Sequence[Matrix], kept: int, how: Episodes) -> None:
        rows, inputs = matrices[0]().shape
        self._matrices, self._kept, self._how = matrices, kept, how
        self._spectra = [torch.linalg.svdvals(matrix().float()).cpu() for matrix in matrices]
        self.policy = Policy.begin(rows, inputs, how.seed)
        self.best, self.best_reward = self.policy.tensors(), -math.inf
        self.history: list[float] = []
        for tensor in self._parameters:
            tensor.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=how.rate)

    @property
    def _parameters(self) -> list[Tensor]:
        return [self.policy.weight, self.policy.bias, self.policy.vector]

    @property
    def finished(self) -> bool:
        """Whether all episodes are done."""
        return len(self.history) == self._how.episodes

    def step(self) -> None:
        """One episode: rows of all matrices, what they are worth, and the policy after that. Raises NonFiniteError."""
        rows = [self._rows(layer, matrix()) for layer, matrix in enumerate(self._matrices)]
        rewards = [self._reward(layer, kept) for layer, kept in enumerate(rows)]
        if sum(rewards) > self.best_reward:
            # the policy that has earned it, and not what becomes of it
            self.best, self.best_reward = self.policy.tensors(), sum(rewards)
        self._learn(rows, returns(rewards, self._how.discount))
        self.history.append(sum(rewards))

    def _reward(self, layer: int, kept: Tensor) -> float:
        return reward(self._spectra[layer], torch.linalg.svdvals(self._matrices[layer]().float()[kept]).cpu())

    def _rows(self, layer: int, w_RI: Tensor) -> Tensor:
        """The rows that stay, ascending."""
        with torch.no_grad():
            keep_R = self.policy.keep(w_RI, self._noise(layer, "rows", len(w_RI)))
        order = draw_order(keep_R, self._noise(layer, "order", len(w_RI)))
        return order.topk(self._kept).indices.sort().values

    def _learn(self, rows: Sequence[Tensor], worth: Sequence[float]) -> None:
        at_once = self._how.update == "per_episode"
        for layer, (kept, gain) in enumerate(zip(rows, worth, strict=True)):
            w_RI = self._matrices[layer]()
            alpha_R = self.policy.shares(w_RI)
            loss = -concrete(alpha_R, self._noise(layer, "loss", len(w_RI)))[kept].log().sum() * gain
            if self._how.divergence != "off":
                loss = loss + divergence(alpha_R, self._how.divergence)
            if not math.isfinite(float(loss.detach())):
                raise NonFiniteError(f"the policy has no finite loss at layer {layer}: lower rate")
            loss.backward()
            if not at_once:
                self._optimizer.step()
                self._optimizer.zero_grad()
        if at_once:
            torch.nn.utils.clip_grad_norm_(self._parameters, _LONGEST)
            self._optimizer.step()
            self._optimizer.zero_grad()

    def _noise(self, layer: int, what: str, rows: int) -> Tensor:
        digest = hashlib.sha256(f"{self._how.seed}:{len(self.history)}:{layer}:{what}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.rand(rows, generator=generator)

    def state(self) -> dict[str, Tensor]:
        """Where the search is, and the best policy so far."""
        found = {f"best.{name}": tensor for name, tensor in self.best.items()}
        found |= {f"now.{name}": tensor for name, tensor in self.policy.tensors().items()}
        found["history"] = torch.tensor(self.history, dtype=torch.float64)
        found["best_reward"] = torch.tensor(self.best_reward, dtype=torch.float64)
        for place, tensor in enumerate(self._parameters):
            found |= {f"optimizer.{place}.{name}": value for name, value in self._optimizer.state[tensor].items()}
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.best = {name: state[f"best.{name}"] for name in self.best}
        self.history, self.best_reward = state["history"].tolist(), float(state["best_reward"])
        with torch.no_grad():
            for name, tensor in zip(("weight", "bias", "vector"), self._parameters, strict=True):
                tensor.copy_(state[f"now.{name}"])
        for place, tensor in enumerate(self._parameters):
            mine: Any = {
                name.rpartition(".")[2]: value
                for name, value in state.items()
                if name.startswith(f"optimizer.{place}.")
            }
            self._optimizer.state[tensor] = mine
