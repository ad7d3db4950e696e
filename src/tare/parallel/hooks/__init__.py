"""Communication hooks: what ranks of `DistributedDataParallel` send each other in place of whole gradients, for slow links.

    tare.hooks.RandK(fraction=0.01).attach(ddp_model)

See docs/links.md. All leave the same gradient on all ranks, count the bytes they send, and give their state as plain tensors.
"""

from tare.parallel.hooks.base import Hook, compress
from tare.parallel.hooks.choose import NAMES, build
from tare.parallel.hooks.power import PowerSGD
from tare.parallel.hooks.projected import Projected
from tare.parallel.hooks.randk import RandK
from tare.parallel.hooks.topk import TopK
from tare.parallel.hooks.whole import Whole

__all__ = ["NAMES", "Hook", "PowerSGD", "Projected", "RandK", "TopK", "Whole", "build", "compress"]
