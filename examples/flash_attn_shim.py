"""A program written for flash-attn, run without it: ``python examples/flash_attn_shim.py``

Only the import is another. A sliding window of 1,024 tokens over 8,192 on a CPU, with gradients, beside the same window
as a mask for torch's own attention.
"""

import time

import torch
import torch.nn.functional as F

from hhattn.integrations.flash_attn import flash_attn_func

if __name__ == "__main__":
    tokens, left = 8192, 1023
    q, k, v = (torch.randn(1, tokens, 4, 64, requires_grad=True) for _ in range(3))
    start = time.perf_counter()
    out = flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
    out.sum().backward()
    ours = time.perf_counter() - start

    at = torch.arange(tokens)
    seen = (at[None] <= at[:, None]) & (at[None] >= at[:, None] - left)
    start = time.perf_counter()
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen)
    expected.sum().backward()
    theirs = time.perf_counter() - start
    print(f"largest difference {(out - expected.transpose(1, 2)).abs().max():.1e}")
    print(f"forward and backward: {ours:.2f} s, torch's attention with a mask {theirs:.2f} s")
