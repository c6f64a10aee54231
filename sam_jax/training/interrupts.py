"""Ctrl-C and SIGTERM in a training loop."""

import os
import signal


class Interrupts:
    """Records Ctrl-C and SIGTERM, so that a step can end and be saved; a second signal kills.

    Use it in the main thread; leaving the context restores the earlier handlers.

        with Interrupts() as interrupts:
            for batch in loader:
                state, metrics = train_step(state, rest, batch, key)
                if interrupts.received is not None:
                    break
    """

    received: int | None = None
    """The signal's number, such as `signal.SIGTERM`; None until there is one."""

    def __enter__(self) -> "Interrupts":
        caught = signal.SIGINT, signal.SIGTERM
        self._before = {number: signal.signal(number, self._record) for number in caught}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number, _):
        self.received = number
        signal.signal(number, signal.SIG_DFL)
        # Not `print`, which the signal may have interrupted.
        os.write(2, b"\nstopping after this step; press again to stop immediately\n")
