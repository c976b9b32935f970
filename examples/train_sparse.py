"""Train sparse-linear attention to do what dense attention does: ``python examples/train_sparse.py``

The teacher attends everything. The student attends a tenth of the blocks, chosen from q and k, exactly and the rest
linearly; its linear branch starts from nothing and learns, on a CPU, what the left-out blocks add.
"""

import torch

import hhattn
from hhattn import masks
from hhattn.nn import BlockSparseAttention, SparseLinearAttention

if __name__ == "__main__":
    torch.manual_seed(0)
    layout = hhattn.VideoLayout(4, 16, 16)
    rope = hhattn.rope_3d(layout.grid, 32)
    teacher, student = BlockSparseAttention(128, 4), SparseLinearAttention(128, 4)
    student.load_state_dict(teacher.state_dict(), strict=False)
    everything = masks.dense(layout)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for step in range(30):
        x = torch.randn(2, layout.seq_len, 128)
        with torch.no_grad():
            wanted = teacher(x, everything, rope=rope)
            q, k = student.queries_and_keys(x, rope)
            critical = masks.select(q, k, masks.mean_pool(), masks.top_k(ratio=0.1))
        loss = (student(x, critical, rope=rope) - wanted).square().mean() / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0 or step == 29:
            print(f"step {step:2}: relative error {loss.sqrt():.3f}")
