"""Writing: one leaf's plain update, from gradient to weight. Chunked where the rule is element-wise, so that temporaries stay small."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tare.core.delta import Delta, Dense, materialise
from tare.core.transform import Transform, Work
from tare.kernels.paper import few

# Elements handled at once by element-wise rules: weight, gradient, moment and direction of a chunk (4 MiB of fp32) stay in
# the private caches of two cores, and the temporaries are small.
CHUNK = 1 << 18
CHUNK_GPU = 1 << 22  # elsewhere launches cost more than memory; as in `blockwise.chunk_elements`


def _chunk(work: Work) -> int:
    return CHUNK if work.weight.device.type == "cpu" else CHUNK_GPU


def update_leaf(transform: Transform, work: Work) -> None:
    """W <- W after one step of `transform`; state is advanced and encoded."""
    if work.weight.numel() > _chunk(work) and by_pieces(transform, work.weight) and work.grad.is_contiguous():
        grad = work.grad.view(-1)
        update_pieces(transform, work, lambda start, stop: grad[start:stop])
        return
    grad = seen(work.grad, work, 0, work.weight.numel())
    compressed = work.compressed.neg() if work.maximize and work.compressed is not None else work.compressed
    delta = transform.update(grad, work.state, work.step, compressed)
    write(shape_of(work, delta), delta, work, 0)
    work.state.flush()


def by_pieces(transform: Transform, weight: Tensor) -> bool:
    """Whether a leaf can be stepped piece by piece."""
    return transform.sharding == "elementwise" and weight.is_contiguous()


def update_pieces(transform: Transform, work: Work, gradient: Callable[[int, int], Tensor]) -> None:
    """`update_leaf` of a leaf that can be stepped by pieces.

    gradient: elements start .. stop - 1 of it, flat; asked for once each, in order, when all pieces before have been written.
    """
    block = math.lcm(*(slot.block for slot in work.state.slots.values()))
    block = math.lcm(block, work.kept.align if work.kept else 1)
    size = -(-_chunk(work) // block) * block
    for start in range(0, work.weight.numel(), size):
        stop = min(start + size, work.weight.numel())
        state = work.state.part(start, stop)
        delta = transform.update(seen(gradient(start, stop), work, start, stop), state, work.step)
        write((stop - start,), delta, work, start)
        state.flush()


def prepare_leaf(transform: Transform, work: Work, whole: bool) -> None:
    """What a due step does first with the gradient, ahead of the step: see `Transform.prepare`."""
    transform.prepare(seen(work.grad, work, 0, work.weight.numel()), work.state, work.step, whole)
    work.state.flush()


def seen(grad: Tensor, work: Work, start: int, stop: int) -> Tensor:
    """The gradient as the rule sees it: negated to ascend, and with wd W added where decay is coupled."""
    if work.maximize:
        grad = grad.neg()
    if not work.coupled:
        return grad
    dtype = work.step.leaf.compute_dtype
    if work.kept is not None:
        weight = work.kept.read(start, stop).view(grad.shape)
    else:
        weight = work.weight if grad.shape == work.weight.shape else work.weight.view(-1)[start:stop]
    return grad.to(dtype).add(weight.to(dtype), alpha=work.weight_decay)


def shape_of(work: Work, delta: Delta) -> tuple[int, ...]:
    """The shape in which the delta is written: its own where the weight has such a view (convolutions are matrices to low-rank
    rules)."""
    leaf = work.step.leaf
    if isinstance(delta, Dense) or leaf.matrix is None or not work.weight.is_contiguous():
        return leaf.shape
    return leaf.view


def _legacy(work: Work) -> bool:
    """Whether moments are kept in `bf16_legacy`: then decay is rounded apart from the update, as in the codes it reproduces."""
    moments = (slot for slot in work.state.slots.values() if slot.spec.kind == "moment")
    return any(slot.form == "plain" and slot.dtype == torch.bfloat16 for slot in moments)


def write(shape: tuple[int, ...], delta: Delta, work: Work, offset: int) -> None:
    """W <- beta W - alpha U for the elements from `offset` on, as many as `shape` has: in place, or as the weight is kept."""
    beta = work.shrink
    alpha = work.gain
    if delta.scaled:
        alpha = work.late_shrink
    leaf, kept = work.step.leaf, work.kept
    whole = shape == leaf.shape
    if not isinstance(delta, Dense) and leaf.matrix and whole and leaf.shape != leaf.view:
        # a non-contiguous convolution: no matrix view of it exists
        delta = Dense(materialise(delta, leaf.view).reshape(shape))
    if kept is None:
        weight = work.weight
        if not whole:
            weight = weight.view(-1)[offset : offset + math.prod(shape)].view(shape)
        if beta != 1.0 and _legacy(work):
            late = work.decay == "after"
            if not late:
                weight.mul_(beta)
            delta.write(weight, alpha / beta if late else alpha, 1.0)
            if late:
                weight.mul_(beta)
            return
        delta.write(weight, alpha, beta)
        return
    if not work.weight.is_contiguous():
        kept.write_strided(materialise(delta, shape).float(), beta, alpha)
        return
    end = offset + math.prod(shape)
    how = kept.rounding(offset, end)
    if how is not None and delta.fused(work.weight.view(-1)[offset:end].view(shape), alpha, beta, **how):
        return
    if not shape:
        kept.write(offset, materialise(delta, shape).float().view(-1), beta, alpha)
        return
    width = math.prod(shape[1:])
    rows = max(1, _chunk(work) // width)
    together = kept.align // math.gcd(width, kept.align)  # rows that make up whole groups
    rows = -(-rows // together) * together
    for start in few(range(0, shape[0], rows)):
        update = delta.rows(start, min(start + rows, shape[0])).float()
        kept.write(offset + start * width, update.contiguous().view(-1), beta, alpha)
