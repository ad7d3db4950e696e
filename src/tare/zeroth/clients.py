"""Clients: a process for each client of a federated method. Data and queries stay where they are; a few numbers travel each round."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch import distributed as dist

from tare.core.errors import InputError
from tare.zeroth.exchange import LossesAt
from tare.zeroth.probes import Point
from tare.zeroth.processes import FAILED, FINE, SKIPS, Processes, WorkersFailed

if TYPE_CHECKING:
    from tare.zeroth.optimizer import ForwardOptimizer


class Clients(Processes):
    """Every process of `torch.distributed` is one client of `fzoos`: process i is client i, with its own closure and its own data.

    A client sends its surrogate's random features (`components` numbers), where its local steps end (as many as are trained) and its
    mean loss, once a round each, and 24 bytes ahead of either on whether it is well and has the same rates and weights. Neither data nor
    single losses nor queries are sent; queries are state of the process that made them, and are to be saved there. Rounds are those of
    the simulation in one process with the same closures and the same `seed`, bit for bit.

    Build it when torch.distributed is set up. Args: as `Workers`.

    Raises (in `step`):
        InputError: processes that differ in rates, seeds, settings or weights.
        WorkersFailed: the closure of another client raised, or its process is gone. Nobody has taken the step.
    """

    def __init__(self, *, group: Any = None, check_every: int = 500):
        super().__init__(group=group, check_every=check_every)
        self.rounds = 0
        self._awaited = False  # whether the others wait for a word

    def place(self, clients: int) -> int:
        """Which of the clients this process is. Raises InputError where there are not as many processes."""
        if self.workers != clients:
            raise InputError(
                f"clients: {clients}, but there are {self.workers} processes; give clients={self.workers}, or start {clients}"
            )
        return self.rank

    # -- a round -------------------------------------------------------------------------------------------------------

    def _alike(self, optimizer: "ForwardOptimizer") -> list[Any]:
        return [*super()._alike(optimizer), repr(optimizer.probe), [leaf.numel for leaf in optimizer.leaves]]

    def evaluate(self, points: list[Point], losses_at: LossesAt) -> list[float]:
        """The losses of this client: points are not shared."""
        return losses_at(points)

    @contextmanager
    def round(self) -> Iterator[None]:
        """Around a round: whatever is raised in it, the others hear of it."""
        self._awaited, self._facts, self._weights = True, 0, 0
        try:
            yield
        except Exception as error:
            if self._awaited:
                self._awaited = False
                try:
                    self._gathered(self._row(FAILED))
                except WorkersFailed:
                    raise error from None
            raise
        self.rounds += 1

    def meet(self, own: Tensor, last: bool = False) -> list[Tensor] | None:
        """Everybody's tensor of this shape, in the order of clients; None where one of them skips this round. last: of the round."""
        if not self._agreed(FINE):
            return None
        found = self._tensors(own)
        self._awaited = not last
        return found

    def skip(self) -> None:
        """This client's losses were not finite: nobody takes the step."""
        if self._awaited:
            self._agreed(SKIPS)

    def _agreed(self, state: float) -> bool:
        self._awaited = False  # an error from here on is everybody's
        rows = self._gathered(self._row(state))
        self._compare(rows)
        well = all(row[0] == FINE for row in rows)
        self._awaited = well
        return well

    def describe(self) -> str:
        """For `explain()`."""
        if not (dist.is_available() and dist.is_initialized()):
            return "a process for each client; torch.distributed is not set up yet"
        spent = f"; {self.sent / self.rounds:.0f} bytes sent a round by each" if self.rounds else ""
        return f"{self.workers} clients, a process each: this is client {self.rank}{spent}"
