"""A line on stderr while a command works something out: live on a terminal; elsewhere one plain line, if it takes a while."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tare.cli.output import console

PATIENCE = 4.0  # seconds from the first news on; a plan that is known takes less


@contextmanager
def waiting(what: str, hint: str) -> Iterator[Callable[[str], None]]:
    """Says `what` is being done; gives a function that tells how far it is.

    Where stderr is no terminal nothing is said before the first news, so that the one line about wrong input stands alone;
    `hint` then says why it takes long.
    """
    out = console(sys.stderr)
    if out.is_terminal:
        with out.status(f"{what} ...") as status:
            yield lambda news: status.update(f"{what}: {news}")
        return
    timer = threading.Timer(PATIENCE, print, (f"tare: {what} ({hint}) ...",), {"file": sys.stderr, "flush": True})
    timer.daemon = True

    def tell(news: str) -> None:
        if not timer.is_alive() and not timer.finished.is_set():
            timer.start()

    try:
        yield tell
    finally:
        timer.cancel()
