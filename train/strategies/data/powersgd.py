"""PowerSGD (Vogels et al. 2019): the gradient of a matrix, n x m, is sent as two factors of rank r.

    M = gradient + error of the last steps           n x m, different on each rank
    P = orthonormal basis of sum(M Q)                all-reduce of n r       with the last step's Q (power iteration)
    Q = sum(M^T P)                                   all-reduce of m r
    sum of the gradients ~ P Q^T; this rank adds its error M - P Q^T / ranks to its next M

Vectors, and matrices that two factors would not make smaller, are sent whole, in a third all-reduce of the bucket.

Torch has a hook for this, which sends P and Q from callbacks. gloo runs callbacks in its own threads: with two buckets
at a time, ranks sent in different orders and crashed. The ledger, which watches the thread of the backward, did not see
these messages either. Here that thread sends all three.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from train.strategies.data.split import powersgd_elements


class PowerSgd:
    """The state between steps: their number, and for each bucket the last Q and the error of every matrix."""

    def __init__(self, group: dist.ProcessGroup, *, rank: int, start_step: int) -> None:
        self.group, self.rank, self.start_step = group, rank, start_step
        self.steps_done = 0
        self.factors: dict[int, list[Tensor]] = {}
        self.errors: dict[int, list[Tensor]] = {}

    def tensors(self) -> dict[str, Tensor]:
        """The state between steps, for a checkpoint."""
        kept = {f"{bucket}/factor/{i}": q for bucket, qs in self.factors.items() for i, q in enumerate(qs)}
        kept |= {f"{bucket}/error/{i}": e for bucket, es in self.errors.items() for i, e in enumerate(es)}
        return {"steps_done": torch.tensor(self.steps_done), **kept}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Replace the state by what `tensors` returned, on the device of the gradients; if this is empty, by the state
        before the first step."""
        self.steps_done = int(tensors.get("steps_done", 0))
        self.forget()
        for name in sorted(tensors.keys() - {"steps_done"}, key=lambda name: int(name.split("/")[2])):
            bucket, kind, _ = name.split("/")
            kept = self.factors if kind == "factor" else self.errors
            kept.setdefault(int(bucket), []).append(tensors[name])

    def forget(self) -> None:
        """Begin anew with the factors and the errors, as they are of a step that is thrown away."""
        self.factors, self.errors = {}, {}

    def sum(self, bucket: dist.GradBucket) -> Tensor:
        """Sum the bucket's buffer over the group, in place, exactly before `start_step`. It needs one to three
        all-reduces."""
        exact = self.steps_done < self.start_step
        self.steps_done += bucket.is_last()
        if exact:
            dist.all_reduce(bucket.buffer(), group=self.group)
            return bucket.buffer()
        gradients = bucket.gradients()  # views of the buffer
        splits = [powersgd_elements(tuple(g.shape), self.rank) < g.numel() for g in gradients]
        self._sum([g for g, split in zip(gradients, splits, strict=True) if not split])
        matrices = [g.flatten(1) for g, split in zip(gradients, splits, strict=True) if split]
        if matrices:
            self._sum_matrices(bucket.index(), matrices)
        return bucket.buffer()

    def _sum_matrices(self, index: int, matrices: list[Tensor]) -> None:
        if index not in self.factors:
            self.factors[index] = [first_factor(m, self.rank) for m in matrices]
            self.errors[index] = [torch.zeros_like(m) for m in matrices]
        for m, error in zip(matrices, self.errors[index], strict=True):
            m += error
        ps = [m @ q for m, q in zip(matrices, self.factors[index], strict=True)]
        self._sum(ps)
        ps = [torch.linalg.qr(p).Q for p in ps]
        qs = [m.T @ p for m, p in zip(matrices, ps, strict=True)]
        self._sum(qs)
        for m, p, q, error in zip(matrices, ps, qs, self.errors[index], strict=True):
            total = p @ q.T
            torch.sub(m, total, alpha=1 / self.group.size(), out=error)
            m.copy_(total)
        self.factors[index] = qs

    def _sum(self, tensors: list[Tensor]) -> None:
        """Sum the tensors over the group in place, in one all-reduce."""
        if not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat, group=self.group)
        for t, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(summed.view_as(t))


def first_factor(m: Tensor, rank: int) -> Tensor:
    """The first Q: random numbers that depend on the shape only, so that they are the same on every rank."""
    generator = torch.Generator().manual_seed(m.shape[0] * m.shape[1])
    drawn = torch.randn(m.shape[1], min(rank, *m.shape), generator=generator, dtype=torch.float64)
    return drawn.to(m)
