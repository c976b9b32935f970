"""block_linear_attention as its recurrence, one token after another, and seeded float64 arguments for it."""

from __future__ import annotations

import torch
from helpers import DEVICE, assert_close_to_fp64, randn, strided
from torch import Tensor

from hhattn import block_linear_attention


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of x [..., D] one by one."""
    pairs = []
    for i in range(0, x.shape[-1], 2):
        c, s = cos[..., i], sin[..., i]
        pairs += [x[..., i] * c - x[..., i + 1] * s, x[..., i] * s + x[..., i + 1] * c]
    return torch.stack(pairs, -1)


MAPS = {
    "relu": lambda x: x.clamp(min=0),
    "identity": lambda x: x,
    "elu1": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "softmax": lambda x: x.softmax(-1),
}


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: list[int],
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    feature_map: str = "relu",
    numerator_map: str | None = None,
    key_gate: Tensor | None = None,
    decay: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-15,
    initial_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence, one token after another, in the dtype of q: (out, kv, k_sum)."""
    batch, _, heads, dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    phi, psi = MAPS[feature_map], MAPS[numerator_map or feature_map]
    kv, k_sum = q.new_zeros(batch, heads, dim, v.shape[3]), q.new_zeros(batch, heads, dim)
    if initial_state is not None:
        kv, k_sum = initial_state
    out, first = [], 0
    for chunk, length in enumerate(lens):
        if decay is not None:
            factor = decay if decay.ndim == 1 else decay[:, chunk]
            kv, k_sum = kv * factor[..., None, None], k_sum * factor[..., None]
        for p in range(first, first + length):
            key = psi(k[:, p]) if rope is None else turn(psi(k[:, p]), rope[0][p], rope[1][p])
            key = key if key_gate is None else key * key_gate[:, p, :, None]
            kv, k_sum = kv + key[..., None] * v[:, p, :, None, :], k_sum + phi(k[:, p])
        for p in range(first, first + length):
            query = psi(q[:, p]) if rope is None else turn(psi(q[:, p]), rope[0][p], rope[1][p])
            row = (query[..., None] * kv).sum(-2)
            out.append(row / ((phi(q[:, p]) * k_sum).sum(-1, keepdim=True) + eps) if normalize else row)
        first += length
    return torch.stack(out, 1), kv, k_sum


def formula(q: Tensor, k: Tensor, v: Tensor, chunk: int, rope: tuple[Tensor, Tensor], eps: float = 1e-15) -> Tensor:
    """What a model without a kernel runs: the core of diffusers' SANA-Video processor, chunk after chunk, in the dtype
    of its inputs but for the sums, which are float32 or wider."""
    kv: Tensor | float = 0.0
    k_sum: Tensor | float = 0.0
    out = []
    for at in range(0, q.shape[1], chunk):
        here = slice(at, at + chunk)
        phi_q, phi_k = q[:, here].relu(), k[:, here].relu()
        cos, sin = (x[here, None, 0::2] for x in rope)
        turned_q, turned_k = (rotated(x, cos, sin).transpose(1, 2) for x in (phi_q, phi_k))
        wide = torch.promote_types(v.dtype, torch.float32)
        kv = kv + turned_k.transpose(2, 3).to(wide) @ v[:, here].transpose(1, 2).to(wide)
        k_sum = k_sum + phi_k.to(wide).sum(1)
        weight = torch.einsum("bshd,bhd->bsh", phi_q.to(wide), k_sum)[..., None] + eps
        out.append(((turned_q.to(wide) @ kv).transpose(1, 2) / weight).to(q.dtype))
    return torch.cat(out, 1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`turn` on whole tensors."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)


def inputs(batch: int, tokens: int, heads: int, kv_heads: int, dim: int, dim_v: int, seed: int = 0) -> list[Tensor]:
    """q, k, v in float64."""
    return [
        randn(batch, tokens, h, d, dtype=torch.float64, seed=3 * seed + i)
        for i, (h, d) in enumerate(((heads, dim), (kv_heads, dim), (kv_heads, dim_v)))
    ]


def tables(tokens: int, dim: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """cos, sin [tokens, dim] in float64 for positions ``start`` …"""
    where = torch.arange(start, start + tokens, dtype=torch.float64, device=DEVICE)
    angles = where[:, None] * 100.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=DEVICE) / dim)
    return angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)


def lens_of(chunk_lens: int | list[int] | None, tokens: int) -> list[int]:
    if chunk_lens is None:
        return [tokens]
    if isinstance(chunk_lens, int):
        return [min(chunk_lens, tokens - i) for i in range(0, tokens, chunk_lens)]
    return chunk_lens


def options(
    batch: int, tokens: int, heads: int, dim: int, dim_v: int, chunks: int, names: set[str]
) -> dict[str, object]:
    """The options in ``names``, in float64; "chunk_decay" is ``decay`` a chunk, "decay" one a head."""

    def positive(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=torch.float64, seed=seed).sigmoid()

    made: dict[str, object] = {}
    if "rope" in names:
        made["rope"] = tables(tokens, dim)
    if "key_gate" in names:
        made["key_gate"] = positive(batch, tokens, heads, seed=50)
    if "decay" in names:
        made["decay"] = positive(heads, seed=51)
    if "chunk_decay" in names:
        made["decay"] = positive(batch, chunks, heads, seed=52)
    if "initial_state" in names:
        kv = randn(batch, heads, dim, dim_v, dtype=torch.float64, seed=53)
        made["initial_state"] = (kv, dim * positive(batch, heads, dim, seed=54))
    return made


def to(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, tuple):
        return tuple(to(x, dtype) for x in value)
    return value.to(dtype) if isinstance(value, Tensor) else value


EVERY = {"rope", "key_gate", "chunk_decay", "initial_state"}


def compare(
    impl: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    chunk_lens: object,
    names: set[str],
    *,
    shift: float = 0.0,
    **how: object,
) -> None:
    """Outputs, states and gradients of everything that has one, beside the recurrence in the same dtype. ``shift`` is
    added to q and k."""
    batch, tokens, heads, kv_heads, dim, dim_v = sizes
    lens = lens_of(chunk_lens, tokens)
    q, k, v = inputs(batch, tokens, heads, kv_heads, dim, dim_v)
    given = [x.to(dtype) for x in (q + shift, k + shift, v)]
    extra = options(batch, tokens, heads, dim, dim_v, len(lens), names)
    upstream = randn(batch, tokens, heads, dim_v, dtype=torch.float64, seed=9)

    def run(ours: bool, up: torch.dtype) -> dict[str, Tensor]:
        outward = torch.float64 if up == torch.float64 else dtype
        leaves = [x.detach().to(outward).requires_grad_() for x in given]
        e = {n: to(x, torch.float64 if up == torch.float64 else torch.float32) for n, x in extra.items()}
        named = dict(zip("qkv", leaves, strict=True))
        for name in ("key_gate", "decay"):
            if name in e:
                named[name] = e[name].requires_grad_()
        if "initial_state" in e:
            named |= zip(("kv_0", "k_sum_0"), (x.requires_grad_() for x in e["initial_state"]), strict=True)
        if ours:
            x = [strided(leaf) for leaf in leaves]
            args = {"chunk_lens": chunk_lens, "output_final_state": True, "impl": impl}
            out, (kv, k_sum) = block_linear_attention(*x, **args, **e, **how)
        else:
            out, kv, k_sum = oracle(*(x.to(up) for x in leaves), lens, **e, **how)
            out = out.to(outward)
        results = {"out": out, "kv": kv, "k_sum": k_sum}
        loss = (out.to(up) * upstream.to(up)).sum() + kv.square().sum() / 100 + k_sum.sum()
        return results | dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    got, exact, base = run(True, torch.float32), run(False, torch.float64), run(False, torch.float32)
    for name, value in got.items():
        factor = 2 if name in ("out", "kv", "k_sum") else 3
        assert_close_to_fp64(value, exact[name], base[name], factor=factor, ulps=8, name=name)
