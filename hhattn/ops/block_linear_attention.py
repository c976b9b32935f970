"""Block-causal linear attention with a carried state: the attention of SANA-Video and of its minute-long form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hhattn import _dispatch, _ext
from hhattn._scan import prefix, share
from hhattn.ops import _amp, _check, _cuda, _linear, _triton
from hhattn.reference import block_linear_attention as _reference

OP = _linear.OP
FEATURE_MAPS = tuple(_reference.FEATURE_MAPS)
# float64 too, so that gradients can be checked against finite differences
_DTYPES = (*_check.DTYPES, torch.float64)
MAX_HEAD_DIM = 256
CUDA_HEAD_DIM = 128  # the most that a CUDA kernel's block of threads holds a state of


class LinearAttentionState(NamedTuple):
    """What a linear attention layer remembers of every token so far; its size does not depend on how many there were.

    kv: [B, H, D, Dv] float32, the decayed sum of rotated keys times values, Σ g·Rψ(k) vᵀ.
    k_sum: [B, H, D] float32, the decayed sum of unrotated keys, Σ φ(k).

    A named tuple, hence a pytree: it unpacks, passes through ``torch.compile`` and ``torch.utils._pytree``.
    """

    kv: Tensor
    k_sum: Tensor

    def to(self, *args: Any, **kwargs: Any) -> LinearAttentionState:
        """Both tensors through :meth:`torch.Tensor.to`."""
        return LinearAttentionState(self.kv.to(*args, **kwargs), self.k_sum.to(*args, **kwargs))

    def detach(self) -> LinearAttentionState:
        """The same state, cut off from the graph that made it."""
        return LinearAttentionState(self.kv.detach(), self.k_sum.detach())

    def rebase(self, cos: Tensor, sin: Tensor) -> LinearAttentionState:
        """Move the origin of the rotary positions forward by Δ, exactly; ``cos``, ``sin`` [D] or [1, D] are Δ's angles.

        A key at position p entered as R(p)·ψ(k). Rotating the state's key axis by −Δ turns that into R(p − Δ)·ψ(k), the
        same keys counted from the new origin, since rotations of one plane compose. ``k_sum`` is not rotated and stays.
        So positions never outgrow a table, or the precision of an angle, however long the clip::

            state = state.rebase(*hhattn.rope_3d((1, 1, 1), head_dim, offset=(frames, 0, 0)))

        Raises TypeError or ValueError if the tables aren't floating tensors with the state's D, which must be even.
        """
        dim = self.kv.shape[-2]
        if dim % 2:
            raise ValueError(f"rebase turns pairs, so the state must have an even head dim, got D = {dim}")
        for name, table in (("cos", cos), ("sin", sin)):
            _check.floating(name, table)
            if tuple(table.shape) not in {(dim,), (1, dim)}:
                raise ValueError(f"{name} must have shape [D] = ({dim},) or [1, D], got {tuple(table.shape)}")
        cos, sin = (table.reshape(dim).to(self.kv.device) for table in (cos, sin))
        kv = _reference.rotate(self.kv.transpose(-1, -2), cos, -sin).transpose(-1, -2).contiguous()
        return LinearAttentionState(kv, self.k_sum)


def _checked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v that fit one another, in autocast's dtype where it is on."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of float32, float16 or bfloat16, got {came}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape [B, S, H, D], got {tuple(x.shape)}")
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head dim of 1 ... {MAX_HEAD_DIM}, got {x.shape[3]}")
        _check.device(name, x, "q", q)
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of k's {k.shape[2]} heads, got {q.shape[2]}")
    _check.shape("k", k, (*q.shape[:2], k.shape[2], q.shape[3]), "[B, S, H_kv, D]")
    _check.shape("v", v, (*k.shape[:3], v.shape[3]), "[B, S, H_kv, Dv]")
    return _amp.cast(q, k, v)


def _check_chunks(chunk_lens: int | Sequence[int] | None, tokens: int) -> int:
    """Check ``chunk_lens`` and return the number of chunks."""
    if chunk_lens is None:
        return 1
    if isinstance(chunk_lens, (Tensor, str, bool)) or not isinstance(chunk_lens, (int, Sequence)):
        raise TypeError(f"chunk_lens must be None, an int or a list of ints, got {type(chunk_lens).__name__}")
    lens = [chunk_lens] if isinstance(chunk_lens, int) else chunk_lens
    if not all(isinstance(n, int) and n > 0 for n in lens):
        raise ValueError(f"chunk_lens must hold positive ints, got {chunk_lens}")
    if isinstance(chunk_lens, int):
        return max(1, -(-tokens // chunk_lens))
    if sum(chunk_lens) != tokens:
        raise ValueError(f"chunk_lens must sum to S = {tokens}, got {sum(chunk_lens)}")
    return max(1, len(chunk_lens))


def _check_pair(name: str, value: object, accepted: str) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        length = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
        raise TypeError(f"{name} must be {accepted} or None, got {type(value).__name__}{length}")


def _check_rope(rope: tuple[Tensor, Tensor] | None, q: Tensor) -> None:
    if rope is None:
        return
    if q.shape[3] % 2:
        raise ValueError(f"rope turns pairs, so q must have an even head dim, got D = {q.shape[3]}")
    _check_pair("rope", rope, "a pair (cos, sin)")
    for name, table in zip(("cos", "sin"), rope, strict=True):
        _check.floating(f"rope: {name}", table)
        _check.shape(f"rope: {name}", table, (q.shape[1], q.shape[3]), "[S, D]")
        _check.device(f"rope: {name}", table, "q", q)


def _per_query_head(name: str, x: Tensor, dim: int, heads: int, kv_heads: int) -> Tensor:
    """``x`` with q's number of heads along ``dim``; what is given per key head counts for its group of query heads."""
    came = x.shape[dim] if x.ndim > dim else 0
    if came == heads:
        return x
    if came == kv_heads:
        return x.repeat_interleave(heads // kv_heads, dim)
    raise ValueError(f"{name} must have {heads} (or {kv_heads}) heads along dim {dim}, got shape {tuple(x.shape)}")


def _check_gate(gate: Tensor | None, q: Tensor, kv_heads: int) -> None:
    if gate is None:
        return
    _check.floating("key_gate", gate)
    if gate.ndim != 3 or gate.shape[:2] != q.shape[:2] or gate.shape[2] not in (q.shape[2], kv_heads):
        raise ValueError(f"key_gate must have shape [B, S, H] = {tuple(q.shape[:3])}, got {tuple(gate.shape)}")
    _check.device("key_gate", gate, "q", q)


def _chunk_decay(decay: Tensor | None, q: Tensor, kv_heads: int, chunks: int) -> Tensor | None:
    """[H] or [B, n_chunks, H] -> [B, H, n_chunks]."""
    if decay is None:
        return None
    _check.floating("decay", decay)
    batch, heads = q.shape[0], q.shape[2]
    if decay.ndim not in (1, 3) or (decay.ndim == 3 and decay.shape[:2] != (batch, chunks)):
        expected = f"[H] = ({heads},) or [B, n_chunks, H] = {(batch, chunks, heads)}"
        raise ValueError(f"decay must have shape {expected}, got {tuple(decay.shape)}")
    _check.device("decay", decay, "q", q)
    decay = _per_query_head("decay", decay, decay.ndim - 1, heads, kv_heads)
    return decay.expand(batch, chunks, heads).transpose(1, 2)


def _carried(state: tuple[Tensor, Tensor] | None, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """The initial state with q's heads, in the dtype of the sums."""
    if state is None:
        return None
    _check_pair("initial_state", state, "a LinearAttentionState, a pair (kv, k_sum)")
    batch, _, heads, dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rest = {"kv": (dim, v.shape[3]), "k_sum": (dim,)}
    carried = []
    for (name, expected), x in zip(rest.items(), state, strict=True):
        _check.floating(f"initial_state.{name}", x)
        x = _per_query_head(f"initial_state.{name}", x, 1, heads, v.shape[2])
        _check.shape(f"initial_state.{name}", x, (batch, heads, *expected), f"[B, H, D{', Dv' * (name == 'kv')}]")
        _check.device(f"initial_state.{name}", x, "q", q)
        carried.append(x.to(dtype))
    return carried[0], carried[1]


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

    For token p of chunk c, with φ = ``feature_map``, ψ = ``numerator_map``, R the rotation of ``rope``,
    g = ``key_gate`` and λ = ``decay``::

        KV_c = λ_c · KV_{c-1} + Σ_{j in c} g_j · R_j ψ(k_j) v_jᵀ        K_c = λ_c · K_{c-1} + Σ_{j in c} φ(k_j)
        out_p = (R_p ψ(q_p))ᵀ KV_c / (φ(q_p)ᵀ K_c + eps)

    SANA-Video 1.0 is the default setting; 2.0 is ``numerator_map="identity"``, ``key_gate=σ(β)``, ``eps=1e-8``.

    Args:
        q: [B, S, H, D]; k: [B, S, H_kv, D]; v: [B, S, H_kv, Dv]; D, Dv ≤ 256, H a multiple of H_kv. float32, float16
            or bfloat16 (float64 for checking gradients), one dtype for the three; sums are float32 whatever the input.
            Under autocast they are cast to its dtype, float64 excepted, as for torch's own attention.
        chunk_lens: None, one chunk: bidirectional attention; an int, that many tokens a chunk, the last may be shorter;
            or a list of lengths that sum to S. Host integers, so that no device is waited for.
        rope: (cos, sin), each [S, D], interleaved pairs, each frequency standing twice. It turns ψ(q) and ψ(k) in the
            numerator; the denominator stays unrotated, a sum of weights that are not negative.
        feature_map: "relu", "identity", "elu1" (elu + 1), "relu2" (squared relu) or "softmax" (over D).
        numerator_map: another map for the numerator; None means ``feature_map``.
        key_gate: [B, S, H], multiplies keys in the numerator only.
        decay: [H] or [B, n_chunks, H], multiplies what is carried (the initial state too) before a chunk is added.
        normalize: False returns the numerator.
        eps: added to the denominator.
        initial_state: what earlier calls left, a :class:`LinearAttentionState` or (kv [B, H, D, Dv], k_sum [B, H, D]).
            Calls on consecutive whole chunks, the state handed on, give what one call on all of them gives.
        output_final_state: also return the state after the last chunk.
        impl: "reference", "cpp", "triton", "cuda"; None chooses.

    Gates, decays and states of H_kv heads are accepted too; a returned state has q's H heads.

    Returns:
        out [B, S, H, Dv] in q's dtype, contiguous; with ``output_final_state`` (out, :class:`LinearAttentionState`).
        Memory is O(S) and O(n_chunks · D · Dv).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: ``impl`` can't run this call.

    Source: SANA-Video (Chen et al., 2025, arXiv:2509.24695), linear attention and block linear attention.
    """
    q, k, v = _checked(q, k, v)
    _check.one_of("feature_map", feature_map, FEATURE_MAPS)
    _check.one_of("numerator_map", numerator_map, (None, *FEATURE_MAPS))
    _check.eps(eps)
    _check_rope(rope, q)
    heads, kv_heads = q.shape[2], k.shape[2]
    _check_gate(key_gate, q, kv_heads)
    settings = {
        "chunk_lens": chunk_lens,
        "rope": rope,
        "feature_map": feature_map,
        "numerator_map": numerator_map or feature_map,
        "key_gate": key_gate,
        "decay": _chunk_decay(decay, q, kv_heads, _check_chunks(chunk_lens, q.shape[1])),
        "normalize": normalize,
        "eps": eps,
        "initial_state": _carried(initial_state, q, v),
        "output_final_state": output_final_state,
    }
    if key_gate is not None and key_gate.shape[2] != kv_heads:  # a gate a query head: keys can't be shared any more
        k, v = (x.repeat_interleave(heads // kv_heads, 2) for x in (k, v))
    # Autocast would turn the float32 sums into half precision, which drifts over a long clip.
    with _amp.off(q.device):
        out, state = _dispatch.call(OP, impl, q, k, v, **settings)
    return (out, LinearAttentionState(*state)) if output_final_state else out


# ---- implementations ----

_dispatch.register(OP, "reference", transforms=True)(_reference.block_linear_attention)


def _refused(impl: str, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor] | None) -> str | None:
    """What the kernels of either ``impl`` don't take."""
    if q.dtype == torch.float64:
        return f"q is float64; {impl} takes float32, float16 and bfloat16"
    if rope is not None and torch.is_grad_enabled() and any(x.requires_grad for x in rope):
        return f"rope needs a gradient, which {impl} doesn't make"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[3] > 1 and x.stride(3) != 1:
            return f"the last dim of {name} is not contiguous (stride {x.stride(3)})"
    return None


def _cpp_can_run(q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None, **how: Any) -> str | None:
    if (reason := _ext.why_missing()) or q is None or k is None or v is None:
        return reason
    if q.device.type != "cpu":
        return f"q is on {q.device}; cpp runs on the CPU"
    return _refused("cpp", q, k, v, how["rope"])


def _triton_can_run(
    q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None, **how: Any
) -> str | None:
    if (reason := _triton.why_not(q)) or q is None or k is None or v is None:
        return reason
    return _refused("triton", q, k, v, how["rope"])


def _cuda_can_run(q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None, **how: Any) -> str | None:
    if (reason := _cuda.why_not(q)) or q is None or k is None or v is None:
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {str(q.dtype).removeprefix('torch.')}; cuda takes float16 and bfloat16"
    for name, x in (("q", q), ("v", v)):
        if x.shape[3] > CUDA_HEAD_DIM:
            return f"{name} has a head dim of {x.shape[3]}; cuda takes up to {CUDA_HEAD_DIM}"
    return _refused("cuda", q, k, v, how["rope"])


def _run(
    namespace: str,
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
    """Sums of the chunks, their prefix, outputs of the tokens: what is as long as the clip is ``namespace``'s work."""
    ops = getattr(torch.ops, namespace)
    maps = FEATURE_MAPS.index(feature_map), FEATURE_MAPS.index(numerator_map)
    chunks = _lengths(chunk_lens, q.shape[1])
    # a row for every token, contiguous: float64 and strides are rare and tables small; on a GPU a table is read once a
    # head, so a number that stands twice is read once
    step = 1 if namespace == "hhattn" else 2
    wide = namespace == _cuda.NAMESPACE  # its kernels take floats only
    cos, sin = (None, None) if rope is None else (x[:, ::step].contiguous().to(_table_dtype(x, wide)) for x in rope)
    gate = None if key_gate is None else key_gate.float().contiguous()
    kv, k_sum = ops.block_linear_sums(k, v, gate, cos, sin, *chunks, *maps)
    kv_0, k_sum_0 = (None, None) if initial_state is None else initial_state
    decay = None if decay is None else decay.float()
    groups = q.shape[2] // k.shape[2]
    kv, k_sum = (prefix(share(x, groups), decay, x_0).contiguous() for x, x_0 in ((kv, kv_0), (k_sum, k_sum_0)))
    out = ops.block_linear_outputs(q, kv, k_sum, cos, sin, *chunks, *maps, normalize, eps)
    # clones: a view of the last chunk's would keep every chunk's sums alive
    return out, (kv[:, :, -1].clone(), k_sum[:, :, -1].clone()) if output_final_state else None


_dispatch.register(OP, "cpp", _cpp_can_run)(partial(_run, "hhattn"))
_dispatch.register(OP, "triton", _triton_can_run)(partial(_run, _triton.NAMESPACE))
_dispatch.register(OP, "cuda", _cuda_can_run)(partial(_run, _cuda.NAMESPACE))


def _lengths(chunk_lens: int | Sequence[int] | None, tokens: int) -> tuple[int, list[int]]:
    """Chunks as the operators take them: one length for all (the last may be shorter), or a list instead."""
    if chunk_lens is None or tokens == 0:
        return max(tokens, 1), []
    return (chunk_lens, []) if isinstance(chunk_lens, int) else (1, list(chunk_lens))


def _table_dtype(table: Tensor, wide: bool) -> torch.dtype:
    return torch.float32 if wide or table.dtype == torch.float64 else table.dtype
