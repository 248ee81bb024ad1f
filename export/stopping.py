"""How a program is asked to stop, by Ctrl-C or SIGTERM, and when that is heeded."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn

ENDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stopped(KeyboardInterrupt):
    """A signal asked for the end; `code` is the exit code for it."""

    def __init__(self, number: int) -> None:
        super().__init__(ENDS[number])
        self.code = 128 + number


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Both Ctrl-C and SIGTERM end the block by way of every `finally`: nothing half-done stays.

    In the main thread. An exception raised while Python runs a destructor is lost: the check it
    yields raises again.
    """
    came: list[int] = []

    def stop(number: int, frame: object) -> NoReturn:
        came.append(number)
        raise Stopped(number)

    def check() -> None:
        if came:
            raise Stopped(came[0])

    before = {number: signal.signal(number, stop) for number in ENDS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Signals wait until the block has ended, or until a part of it that heeds them:

        with deferred() as heeded, opened() as file, heeded():
            ...

    so that nothing comes between opening and closing and what has to be known of them. Then they
    do what they did before. They are held by handlers, as a thread's mask would leave them to other
    threads; beside the main thread, where Python runs none, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _nothing
        return
    handlers = {number: signal.getsignal(number) for number in ENDS}
    before = {number: handler for number, handler in handlers.items() if handler is not None}
    came: list[int] = []
    is_held = True

    def receive(number: int, frame: object) -> None:
        if is_held:
            came.append(number)
        else:
            deliver(number)

    def deliver(number: int) -> None:
        signal.signal(number, before[number])
        signal.raise_signal(number)

    def hold() -> None:
        nonlocal is_held
        is_held = True
        for number in before:
            signal.signal(number, receive)

    def release() -> None:
        nonlocal is_held
        is_held = False
        while came:
            deliver(came.pop(0))

    @contextmanager
    def heeded() -> Iterator[None]:
        try:
            release()
            yield
        finally:
            hold()

    try:
        hold()
        yield heeded
    finally:
        # Where a signal raises before all have their own again, the others' are as good as theirs.
        is_held = False
        for number, handler in before.items():
            signal.signal(number, handler)
        release()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
