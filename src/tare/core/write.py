"""Writing: one leaf's plain update, from gradient to weight. Chunked where the rule is element-wise, so that temporaries stay small."""

from torch import Tensor

from tare.core.delta import Delta, Dense, materialise
from tare.core.transform import Transform, Work
from tare.kernels import native, rounding

# Elements handled at once by element-wise rules: weight, gradient, moment and direction of a chunk (4 MiB of fp32) stay in
# the private caches of two cores, and the temporaries are small.
CHUNK = 1 << 18


def update_leaf(transform: Transform, work: Work) -> None:
    """W <- W after one step of `transform`; state is advanced and encoded."""
    if transform.sharding == "elementwise" and work.weight.numel() > CHUNK and _flat(work):
        block = max((slot.block for slot in work.state.slots.values()), default=1)
        size = -(-CHUNK // block) * block
        weight, grad = work.weight.view(-1), work.grad.view(-1)
        for start in range(0, weight.numel(), size):
            stop = min(start + size, weight.numel())
            state = work.state.part(start, stop)
            g = grad[start:stop].neg() if work.maximize else grad[start:stop]
            delta = transform.update(g, state, work.step)
            write(weight[start:stop], delta, work, start)
            state.flush()
        return
    grad = work.grad.neg() if work.maximize else work.grad
    compressed = work.compressed.neg() if work.maximize and work.compressed is not None else work.compressed
    delta = transform.update(grad, work.state, work.step, compressed)
    write(_shaped(work, delta), delta, work, 0)
    work.state.flush()


def _flat(work: Work) -> bool:
    return work.weight.is_contiguous() and work.grad.is_contiguous()


def _shaped(work: Work, delta: Delta) -> Tensor:
    """The weight in the shape of the delta: a view where one exists (convolutions are matrices to low-rank rules)."""
    matrix = work.step.leaf.matrix
    if isinstance(delta, Dense) or work.weight.ndim == 2 or matrix is None or not work.weight.is_contiguous():
        return work.weight
    return work.weight.view(matrix)


def write(weight: Tensor, delta: Delta, work: Work, offset: int) -> None:
    """W <- beta W - alpha U, or the same rounded stochastically, with noise by element number from `offset`."""
    beta = work.shrink
    alpha = work.gain
    if delta.scaled:
        alpha = beta if work.decay == "after" else 1.0
    lone = weight.ndim != 2 and not isinstance(delta, Dense)
    if lone:  # a non-contiguous convolution: no matrix view of it exists
        matrix = work.step.leaf.matrix
        assert matrix is not None
        delta = Dense(materialise(delta, matrix).reshape(weight.shape))
    if work.noise is None:
        delta.write(weight, alpha, beta)
        return
    if weight.ndim == 0 or not weight.is_contiguous():
        update = materialise(delta, tuple(weight.shape)).float()
        rounding.write_stochastic_(weight, update, decay=beta, alpha=alpha, key=work.noise, start=offset)
        return
    width = weight.numel() // max(1, weight.shape[0])
    rows = max(1, CHUNK // max(1, width))
    for start in range(0, weight.shape[0], rows):
        part, update = weight[start : start + rows], delta.rows(start, start + rows).float()
        first = offset + start * width
        if not native.write_stochastic_(part, update, decay=beta, alpha=alpha, key=work.noise, start=first):
            rounding.write_stochastic_(part, update, decay=beta, alpha=alpha, key=work.noise, start=first)
