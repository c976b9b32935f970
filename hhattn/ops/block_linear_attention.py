"""Block-causal linear attention with a carried state: the attention of SANA-Video and of its minute-long form."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from hhattn import _dispatch
from hhattn.reference import block_linear_attention as _reference

FEATURE_MAPS = tuple(_reference.FEATURE_MAPS)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class LinearAttentionState(NamedTuple):
    """What a linear attention layer remembers of every token so far; its size does not depend on how many there were.

    kv: [B, H, D, Dv] float32, the decayed sum of rotated keys times values, Σ g·Rψ(k) vᵀ.
    k_sum: [B, H, D] float32, the decayed sum of unrotated keys, Σ φ(k).

    A named tuple, hence a pytree: it unpacks, passes through ``torch.compile`` and ``torch.utils._pytree``.
    """

    kv: Tensor
    k_sum: Tensor

    def to(self, *args: object, **kwargs: object) -> LinearAttentionState:
        """Both tensors through :meth:`torch.Tensor.to`."""
        return LinearAttentionState(self.kv.to(*args, **kwargs), self.k_sum.to(*args, **kwargs))

    def detach(self) -> LinearAttentionState:
        """The same state, cut off from the graph that made it."""
        return LinearAttentionState(self.kv.detach(), self.k_sum.detach())

    def rebase(self, cos: Tensor, sin: Tensor) -> LinearAttentionState:
        """Move the origin of the rotary positions forward by Δ, exactly; ``cos``, ``sin`` [D] or [1, D] are the angles of Δ.

        A key at position p entered as R(p)·ψ(k). Rotating the state's key axis by −Δ turns that into R(p − Δ)·ψ(k), the
        sum of the same keys counted from the new origin, since rotations of one plane compose. ``k_sum`` is not rotated
        and stays. So positions never outgrow a table, or the precision of an angle, however long the clip::

            state = state.rebase(*hhattn.rope_3d((1, 1, 1), head_dim, offset=(frames, 0, 0)))

        Raises ValueError if the tables don't have the state's D.
        """
        dim = self.kv.shape[-2]
        for name, table in (("cos", cos), ("sin", sin)):
            if tuple(table.shape) not in {(dim,), (1, dim)}:
                raise ValueError(f"{name} has shape {list(table.shape)}; accepted: [{dim}] or [1, {dim}]")
        cos, sin = cos.reshape(dim), sin.reshape(dim)
        kv = _reference.rotate(self.kv.transpose(-1, -2), cos, -sin).transpose(-1, -2).contiguous()
        return LinearAttentionState(kv, self.k_sum)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; accepted: [B, S, H, D]")
        if x.dtype not in _DTYPES or x.dtype != q.dtype:
            raise TypeError(
                f"{name} is {x.dtype}; accepted: one of {', '.join(map(str, _DTYPES))}, the same for q, k and v"
            )
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}; accepted: one device")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k has shape {list(k.shape)}; accepted: [B, S, H_kv, D] with q's B, S and D ({list(q.shape)})"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v has shape {list(v.shape)}; accepted: [B, S, H_kv, Dv] with k's B, S and H_kv ({list(k.shape)})"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads; accepted: a multiple of k's {k.shape[2]}")


def _check_chunks(chunk_lens: int | Sequence[int] | None, tokens: int) -> int:
    """Check ``chunk_lens`` and return the number of chunks."""
    if chunk_lens is None:
        return 1
    if isinstance(chunk_lens, (Tensor, str, bool)) or not isinstance(chunk_lens, (int, Sequence)):
        raise TypeError(f"chunk_lens is {type(chunk_lens).__name__}; accepted: None, an int, or a list of ints")
    lens = [chunk_lens] if isinstance(chunk_lens, int) else chunk_lens
    if not all(isinstance(n, int) and n > 0 for n in lens):
        raise ValueError(f"chunk_lens={chunk_lens}; accepted: positive ints")
    if isinstance(chunk_lens, int):
        return max(1, -(-tokens // chunk_lens))
    if sum(chunk_lens) != tokens:
        raise ValueError(f"chunk_lens sums to {sum(chunk_lens)}; accepted: lengths that sum to S={tokens}")
    return len(chunk_lens)


def _check_settings(q: Tensor, rope: tuple[Tensor, Tensor] | None, maps: dict[str, str]) -> None:
    for name, value in maps.items():
        if value not in FEATURE_MAPS:
            raise ValueError(f"{name}={value!r}; accepted: {', '.join(FEATURE_MAPS)}")
    if rope is None:
        return
    if q.shape[3] % 2:
        raise ValueError(f"rope needs an even head dim; q has D={q.shape[3]}")
    for name, table in zip(("cos", "sin"), rope, strict=True):
        if table.shape != (q.shape[1], q.shape[3]):
            raise ValueError(
                f"rope: {name} has shape {list(table.shape)}; accepted: [S, D] = [{q.shape[1]}, {q.shape[3]}]"
            )


def _per_head(name: str, x: Tensor, dim: int, heads: int, kv_heads: int) -> Tensor:
    """``x`` with q's number of heads along ``dim``: given for key/value heads, each counts for its group of query heads."""
    if x.shape[dim] == heads:
        return x
    if x.shape[dim] == kv_heads:
        return x.repeat_interleave(heads // kv_heads, dim)
    raise ValueError(f"{name} has shape {list(x.shape)}; accepted: {heads} or {kv_heads} heads along dim {dim}")


def _decay(decay: Tensor | None, q: Tensor, kv_heads: int, chunks: int) -> Tensor | None:
    """[H] or [B, n_chunks, H] -> [B, H, n_chunks]."""
    if decay is None:
        return None
    batch, heads = q.shape[0], q.shape[2]
    if decay.ndim not in (1, 3) or (decay.ndim == 3 and decay.shape[:2] != (batch, chunks)):
        raise ValueError(
            f"decay has shape {list(decay.shape)}; accepted: [H] or [B, n_chunks, H] = [{batch}, {chunks}, {heads}]"
        )
    decay = _per_head("decay", decay, decay.ndim - 1, heads, kv_heads)
    return decay.expand(batch, chunks, heads).transpose(1, 2)


def _state(state: tuple[Tensor, Tensor] | None, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    if state is None:
        return None
    kv, k_sum = state
    batch, _, heads, dim = q.shape
    if kv.ndim != 4 or kv.shape[0] != batch or kv.shape[2:] != (dim, v.shape[3]):
        raise ValueError(f"initial_state.kv has shape {list(kv.shape)}; accepted: {[batch, heads, dim, v.shape[3]]}")
    if k_sum.ndim != 3 or k_sum.shape[0] != batch or k_sum.shape[2] != dim:
        raise ValueError(f"initial_state.k_sum has shape {list(k_sum.shape)}; accepted: {[batch, heads, dim]}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv = _per_head("initial_state.kv", kv, 1, heads, v.shape[2])
    return kv.to(dtype), _per_head("initial_state.k_sum", k_sum, 1, heads, v.shape[2]).to(dtype)


def block_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_lens: int | Sequence[int] | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    feature_map: str = "relu",
    numerator_map: str | None = None,
    key_gate: Tensor | None = None,
    decay: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-15,
    initial_state: LinearAttentionState | None = None,
    output_final_state: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Linear attention in which a token sees its whole chunk and every chunk before it, at a cost linear in tokens.

    For token p of chunk c, with φ = ``feature_map``, ψ = ``numerator_map``, R the rotation of ``rope``, g = ``key_gate``
    and λ = ``decay``::

        KV_c = λ_c · KV_{c-1} + Σ_{j in c} g_j · R_j ψ(k_j) v_jᵀ        K_c = λ_c · K_{c-1} + Σ_{j in c} φ(k_j)
        out_p = (R_p ψ(q_p))ᵀ KV_c / (φ(q_p)ᵀ K_c + eps)

    Shapes:
        q: [B, S, H, D]; k: [B, S, H_kv, D]; v: [B, S, H_kv, Dv], H a multiple of H_kv; float32, float16 or bfloat16
            (float64 for checking gradients), the last dim contiguous or not. Sums are float32 whatever the input.
        chunk_lens: None, one chunk: bidirectional attention; an int, that many tokens a chunk, the last may be shorter; or
            a list of lengths that sum to S. Host integers, so that no device is waited for.
        rope: (cos, sin), each [S, D], interleaved pairs, each frequency standing twice. It turns ψ(q) and ψ(k) in the
            numerator; the denominator stays unrotated, so that it stays a sum of non-negative weights.
        key_gate: [B, S, H], multiplies keys in the numerator only.
        decay: [H] or [B, n_chunks, H], multiplies what is carried (the initial state too) before a chunk is added.
        initial_state: what earlier calls left: kv [B, H, D, Dv] and k_sum [B, H, D]. Calls on consecutive whole chunks, the
            state handed on, give what one call on all of them gives.
        Gates, decays and states for H_kv heads are accepted too; the returned state has q's H heads.
        Returns [B, S, H, Dv] in q's dtype, contiguous; with ``output_final_state`` also the :class:`LinearAttentionState`.

    ``feature_map`` is one of relu, identity, elu1 (elu + 1), relu2 (squared relu), softmax (over D). ``numerator_map=None``
    means ``feature_map``. With ``normalize=False`` the numerator is the result. Memory is O(S) and O(n_chunks · D · Dv).

    SANA-Video 1.0 is the default setting; 2.0 is ``numerator_map="identity"``, ``key_gate=σ(β)``, ``eps=1e-8``. Under
    autocast q, k and v are cast to its dtype as for torch's own attention.

    Raises TypeError or ValueError for arguments outside the above, RuntimeError if ``impl`` can't run here.

    Source: SANA-Video (arXiv:2509.24695), sections on linear attention and on block linear attention.
    """
    autocast = torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type)
    if autocast:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    _check_tensors(q, k, v)
    chunks = _check_chunks(chunk_lens, q.shape[1])
    numerator_map = feature_map if numerator_map is None else numerator_map
    _check_settings(q, rope, {"feature_map": feature_map, "numerator_map": numerator_map})
    heads, kv_heads = q.shape[2], k.shape[2]
    if key_gate is not None:
        if key_gate.ndim != 3 or key_gate.shape[:2] != q.shape[:2]:
            raise ValueError(f"key_gate has shape {list(key_gate.shape)}; accepted: [B, S, H] = {list(q.shape[:3])}")
        if key_gate.shape[2] != kv_heads:
            key_gate = _per_head("key_gate", key_gate, 2, heads, kv_heads)
            k, v = (x.repeat_interleave(heads // kv_heads, 2) for x in (k, v))
    # Autocast would turn the float32 sums into half precision, which drifts over a long clip.
    with torch.autocast(q.device.type, enabled=False) if autocast else nullcontext():
        out, state = _dispatch.call(
            "block_linear_attention",
            impl,
            q,
            k,
            v,
            chunk_lens=chunk_lens,
            rope=rope,
            feature_map=feature_map,
            numerator_map=numerator_map,
            key_gate=key_gate,
            decay=_decay(decay, q, kv_heads, chunks),
            normalize=normalize,
            eps=eps,
            initial_state=_state(initial_state, q, v),
            output_final_state=output_final_state,
        )
    return (out, LinearAttentionState(*state)) if output_final_state else out
