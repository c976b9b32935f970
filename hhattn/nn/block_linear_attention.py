"""A linear attention layer whose memory of the past is one matrix a head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hhattn.nn._projections import AttentionProjections
from hhattn.ops.block_linear_attention import LinearAttentionState, block_linear_attention


class BlockLinearAttention(AttentionProjections):
    """Self-attention by :func:`hhattn.block_linear_attention`, as in SANA-Video and LongSANA.

    ``BlockLinearAttention(2240, 20)`` has the parameters and the result of SANA-Video's self-attention. ``eps`` is the
    denominator's, ``norm_eps`` that of the q and k norms; the other settings are those of the op and of
    :class:`~hhattn.nn._projections.AttentionProjections`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        qk_norm: str | None = "rms_across_heads",
        feature_map: str = "relu",
        numerator_map: str | None = None,
        normalize: bool = True,
        bias: bool = True,
        eps: float = 1e-15,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(
            dim, num_heads, head_dim=head_dim, num_kv_heads=num_kv_heads, qk_norm=qk_norm, bias=bias, norm_eps=norm_eps
        )
        self.feature_map, self.numerator_map = feature_map, numerator_map
        self.normalize, self.eps = normalize, eps

    def forward(
        self,
        x: Tensor,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        chunk_lens: int | Sequence[int] | None = None,
        key_gate: Tensor | None = None,
        decay: Tensor | None = None,
        initial_state: LinearAttentionState | None = None,
        output_final_state: bool = False,
    ) -> Tensor | tuple[Tensor, LinearAttentionState]:
        """x [B, S, C] -> [B, S, C], or (out, state) with ``output_final_state``.

        Streaming: hand each call the tokens of the next chunk and the state the call before returned.
        """
        q, k = self.queries_and_keys(x)  # the op rotates them itself, after the feature map
        result = block_linear_attention(
            q,
            k,
            self.heads(self.to_v(x)),
            chunk_lens=chunk_lens,
            rope=rope,
            feature_map=self.feature_map,
            numerator_map=self.numerator_map,
            key_gate=key_gate,
            decay=decay,
            normalize=self.normalize,
            eps=self.eps,
            initial_state=initial_state,
            output_final_state=output_final_state,
        )
        if isinstance(result, tuple):
            return self.to_out(result[0].flatten(2)), result[1]
        return self.to_out(result.flatten(2))
