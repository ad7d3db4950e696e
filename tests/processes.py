"""Where tests get processes from: forked from one server that has imported once what takes long to import.

There is one server in a test process whatever asks for it, so what it imports is listed here and nowhere else. It finds installed packages
only, not the helpers of the tests, and it must start no thread: a fork would not take it along.
"""

import multiprocessing
import pkgutil

from tare import methods

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",  # FSDP2 and DDP import it at their first model
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
        "tare.train.loop",
        *(f"tare.methods.{module.name}" for module in pkgutil.iter_modules(methods.__path__)),
    ]
)
