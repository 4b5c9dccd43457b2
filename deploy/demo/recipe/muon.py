"""Muon: momentum whose matrices are orthogonalized before they are applied (Jordan et al., 2024).

Each rank orthogonalizes its share of the matrices; one all-reduce shares the results.
"""

import torch
import torch.distributed as dist
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each in a [count, m, n] stack, roughly, in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).to(torch.bfloat16, memory_format=torch.contiguous_format)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NUM_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).float()


class Muon:
    """`matrix_sizes` gives the (m, n) of each parameter's matrices: one may stack or fuse many."""

    def __init__(
        self, parameters: list[Tensor], matrix_sizes: list[tuple[int, int]], *, momentum: float, weight_decay: float
    ) -> None:
        self.parameters, self.matrix_sizes = parameters, matrix_sizes
        self.momentum, self.weight_decay = momentum, weight_decay
        self.buffers = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        sizes = [p.numel() for p in self.parameters]
        flat = torch.zeros(sum(sizes))
        updates = [u.view_as(p) for u, p in zip(flat.split(sizes), self.parameters, strict=True)]
        for idx, (p, buffer, update) in enumerate(zip(self.parameters, self.buffers, updates, strict=True)):
            buffer.lerp_(p.grad, 1 - self.momentum)
            if idx % num_ranks == rank:
                m, n = self.matrix_sizes[idx]
                gradient = p.grad.lerp(buffer, self.momentum)  # Nesterov
                orthogonal = orthogonalize(gradient.view(-1, m, n)) * max(1.0, m / n) ** 0.5
                update.copy_(orthogonal.view_as(p))
        if num_ranks > 1:
            dist.all_reduce(flat)
        for p, update in zip(self.parameters, updates, strict=True):
            p.mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr)

    def state_dict(self) -> list[Tensor]:
        return self.buffers

    def load_state_dict(self, buffers: list[Tensor]) -> None:
        for own, loaded in zip(self.buffers, buffers, strict=True):
            own.copy_(loaded)
