"""T5 and T12: the same numbers whatever the grouping, the order, the thread count; and again from the same seed."""

import torch
from torch import nn

from tare.testing.subject import FEW, FORMS, PERIOD, Subject, drive, gradient, leaves, near, same, snapshot

STEPS = 2 * PERIOD + 1


def groups_equal_separate_optimizers(subject: Subject) -> None:
    """One optimizer with a group for each leaf equals an optimizer for each leaf, named or not, bit for bit."""
    if subject.coupled:
        return
    for form, storage in FORMS.items():
        for with_names in (True, False):
            names = None if form == "fp32" else FEW
            together, apart = leaves(names), leaves(names)
            one = subject.build(
                [{"params": [i if with_names else i[1]], "lr": 1e-3 * (k + 1)} for k, i in enumerate(together)],
                storage=storage,
            )
            drive(one, together, 0, STEPS)
            for k, item in enumerate(apart):
                alone = subject.build([item if with_names else item[1]], lr=1e-3 * (k + 1), storage=storage)
                drive(alone, [item], 0, STEPS)
            same(snapshot(apart), snapshot(together), f"{storage.moment}, {'named' if with_names else 'unnamed'}")


def order_does_not_matter(subject: Subject) -> None:
    """Parameters in another order take the same steps: no random number depends on a position."""
    for with_names in (True, False):
        straight, turned = leaves(), list(reversed(leaves()))
        drive(subject.build([i if with_names else i[1] for i in straight]), straight, 0, STEPS)
        drive(subject.build([i if with_names else i[1] for i in turned]), turned, 0, STEPS)
        same(dict(reversed(snapshot(turned).items())), snapshot(straight), "reversed order")


def repeats_bit_for_bit(subject: Subject) -> None:
    """The same seed twice gives the same bits, in every storage."""
    for storage in FORMS.values():
        runs = []
        for _ in range(2):
            named = leaves()
            drive(subject.build(named, storage=storage, seed=11), named, 0, STEPS)
            runs.append(snapshot(named))
        same(runs[1], runs[0], f"twice, {storage.moment}")


def threads_do_not_matter(subject: Subject) -> None:
    """One thread and two agree to rounding, on a leaf large enough to be shared out: only the order of sums may differ."""
    before = torch.get_num_threads()
    for form in ("fp32", "int8"):
        runs = []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                named = [("big.weight", nn.Parameter(gradient("big weight", 0, (640, 64))))]
                optimizer = subject.build(named, storage=FORMS[form])
                for step in range(PERIOD + 2):
                    grad = gradient("big weight", step + 1, (640, 64))
                    # Two singular values that stand apart, so that the basis does not magnify rounding.
                    grad[:, 0] *= 8.0
                    grad[:, 1] *= 4.0
                    named[0][1].grad = grad
                    optimizer.step()
                runs.append(snapshot(named))
        finally:
            torch.set_num_threads(before)
        # Steps are 5e-3.
        # A code of an 8-bit moment may fall to the other side: some per cent of a step of 5e-3.
        near(runs[1], runs[0], 1e-5 if form == "fp32" else 1e-3, f"two threads, {form}")


CHECKS = (groups_equal_separate_optimizers, order_does_not_matter, repeats_bit_for_bit, threads_do_not_matter)
