"""Block-causal linear attention as a formula in PyTorch: the oracle, and what runs where no kernel does.

For token p of chunk c, with φ the feature map, ψ the numerator map, R_p the rotation at position p, g the key gate and
λ the decay::

    KV_c = λ_c · KV_{c-1} + Σ_{j in chunk c} g_j · R_j ψ(k_j) v_jᵀ          (KV_{-1}, K_{-1} = initial_state)
    K_c  = λ_c · K_{c-1}  + Σ_{j in chunk c} φ(k_j)
    out_p = (R_p ψ(q_p))ᵀ KV_c / (φ(q_p)ᵀ K_c + eps)

All chunks are computed at once: one batched matrix product for the sums of a run of equally long chunks, a prefix over
the chunks, one batched product for the outputs. Everything is summed in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hhattn._scan import prefix, share

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "identity": lambda x: x,
    "elu1": lambda x: F.elu(x) + 1,
    "relu2": lambda x: F.relu(x).square(),
    "softmax": lambda x: x.softmax(-1),
}


class Run(NamedTuple):
    """``chunks`` chunks of ``length`` tokens one after another, the first of them at token ``start``."""

    start: int
    chunks: int
    length: int

    def split(self, x: Tensor) -> Tensor:
        """[B, H, S, D] -> this run's tokens [B, H, chunks, length, D], a view."""
        return x.narrow(2, self.start, self.chunks * self.length).unflatten(2, (self.chunks, self.length))


def chunk_runs(chunk_lens: int | Sequence[int] | None, tokens: int) -> list[Run]:
    """The chunks of ``tokens`` tokens as runs of equal length: a run is one reshape and one product. No tokens are one
    empty chunk."""
    if chunk_lens is None or tokens == 0:
        return [Run(0, 1, tokens)]
    if isinstance(chunk_lens, int):
        full, rest = tokens // chunk_lens, tokens % chunk_lens  # no divmod: Dynamo has none for symbols
        runs = [Run(0, full, chunk_lens)] if full else []
        return [*runs, Run(full * chunk_lens, 1, rest)] if rest else runs
    runs, start = [], 0
    for length, group in groupby(chunk_lens):
        runs.append(Run(start, len(list(group)), length))
        start += runs[-1].chunks * length
    return runs


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_0, x_1), (x_2, x_3), … of [..., D] by the angles of ``cos``, ``sin`` [..., D], each twice."""
    cos, sin = cos[..., 0::2].to(x.dtype), sin[..., 1::2].to(x.dtype)
    if torch.compiler.is_compiling():
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    # The same as one complex product: eagerly, passes over strided halves take ten times as long on a CPU. A compiler
    # fuses those passes, and generates no code for complex numbers.
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def _join(parts: list[Tensor]) -> Tensor:
    """The runs' results one after another along dim 2; no copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _chunk_sums(runs: list[Run], key: Tensor, value: Tensor | None = None) -> Tensor:
    """Σ k vᵀ [B, H, N, D, Dv] of each chunk, or Σ k [B, H, N, D] without ``value``."""
    if value is None:
        return _join([run.split(key).sum(3) for run in runs])
    return _join([run.split(key).transpose(3, 4) @ run.split(value) for run in runs])


def _apply(runs: list[Run], query: Tensor, state: Tensor) -> Tensor:
    """Each chunk's queries [B, H, S, D] times its state [B, H, N, D, Dv] -> [B, H, S, Dv]."""
    states = state.split([run.chunks for run in runs], 2)
    return _join([(run.split(query) @ s).flatten(2, 3) for run, s in zip(runs, states, strict=True)])


def _weight(runs: list[Run], query: Tensor, k_sum: Tensor) -> Tensor:
    """Each chunk's queries [B, H, S, D] times its key sum [B, H, N, D] -> [B, H, S, 1]. The sum is a row: a product
    with it as a column takes six times as long on a CPU."""
    sums = k_sum[:, :, :, None].split([run.chunks for run in runs], 2)
    rows = [(s @ run.split(query).transpose(3, 4)).flatten(2) for run, s in zip(runs, sums, strict=True)]
    return _join(rows)[..., None]


def block_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_lens: int | Sequence[int] | None,
    rope: tuple[Tensor, Tensor] | None,
    feature_map: str,
    numerator_map: str,
    key_gate: Tensor | None,
    decay: Tensor | None,
    normalize: bool,
    eps: float,
    initial_state: tuple[Tensor, Tensor] | None,
    output_final_state: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The formula above, on what :func:`hhattn.block_linear_attention` validated: ``key_gate`` [B, S, H_kv], ``decay``
    [B, H, N], ``initial_state`` with q's heads H and in the dtype of the sums."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    phi, psi = FEATURE_MAPS[feature_map], FEATURE_MAPS[numerator_map]
    runs, groups = chunk_runs(chunk_lens, q.shape[1]), q.shape[2] // k.shape[2]
    query, key, value = (x.transpose(1, 2).to(dtype).contiguous() for x in (q, k, v))
    phi_q, phi_k = phi(query), phi(key)
    psi_q, psi_k = (phi_q, phi_k) if numerator_map == feature_map else (psi(query), psi(key))
    if rope is not None:
        psi_q, psi_k = rotate(psi_q, *rope), rotate(psi_k, *rope)
    if key_gate is not None:
        psi_k = psi_k * key_gate.transpose(1, 2)[..., None].to(dtype)

    decay = None if decay is None else decay.to(dtype)
    kv_0, k_sum_0 = (None, None) if initial_state is None else initial_state
    kv = prefix(share(_chunk_sums(runs, psi_k, value), groups), decay, kv_0)
    k_sum = prefix(share(_chunk_sums(runs, phi_k), groups), decay, k_sum_0)

    out = _apply(runs, psi_q, kv)
    if normalize:
        out = out / (_weight(runs, phi_q, k_sum) + eps)
    out = out.transpose(1, 2).to(q.dtype).contiguous()
    # clones: a view of the last chunk's would keep every chunk's sums alive
    return out, (kv[:, :, -1].clone(), k_sum[:, :, -1].clone()) if output_final_state else None
