"""Work in threads ahead of the caller and behind it: in order, with bounded queues, ended at once.

Threads and not processes: decoding and NumPy release Python's lock, and results need not be copied.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: Seconds that the end waits for the threads. One that decodes an enormous image is left to itself: it only
#: holds memory, and does not keep the process from ending.
PATIENCE = 0.5


def ahead(work: Callable[[T], R], items: Iterable[T], workers: int, room: int) -> Generator[R, None, None]:
    """``work(item)`` for each of ``items``, in order, computed by ``workers`` threads ahead of the caller.

    The threads also take the items, one thread at a time. At most ``room`` items are being worked on or wait
    for the caller. An error of ``items`` or ``work`` is raised at its place in the order. Close the iterator
    to end the threads; then no thread uses ``items`` any more. 0 workers: everything is done by the caller.
    """
    if not workers:
        yield from map(work, items)
        return
    team = _Team(work, items, room)
    threads = [threading.Thread(target=team.run, name=f"ahead-{n}", daemon=True) for n in range(workers)]
    for thread in threads:
        thread.start()
    try:
        while (future := team.futures.get()) is not None:
            result = future.result()
            team.room.release()
            yield result
    finally:
        team.end()
        patient_until = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, patient_until - time.monotonic()))


class _Team(Generic[T, R]):
    """What the threads of :func:`ahead` share. ``futures``: one per item, in order; at the end None."""

    def __init__(self, work: Callable[[T], R], items: Iterable[T], room: int) -> None:
        self.futures: SimpleQueue[Future[R] | None] = SimpleQueue()
        self.room = threading.Semaphore(room)
        self._work, self._items = work, iter(items)
        self._taking = threading.Lock()
        self._ended = False

    def run(self) -> None:
        """What each thread does."""
        while True:
            self.room.acquire()
            future: Future[R] = Future()
            with self._taking:
                if self._ended:
                    break
                try:
                    item = next(self._items)
                except StopIteration:
                    self.futures.put(None)
                    break
                except BaseException as error:  # the caller shall see it, whatever it is
                    future.set_exception(error)
                    self.futures.put(future)
                    break
                self.futures.put(future)
            try:
                future.set_result(self._work(item))
            except BaseException as error:
                future.set_exception(error)
        self._ended = True
        self.room.release()  # wakes the next thread, which ends too

    def end(self) -> None:
        """Let the threads end after what they are doing. Waits while one takes an item."""
        with self._taking:
            self._ended = True
        self.room.release()


def behind(
    work: Callable[[T], R], items: Iterable[T], threaded: bool, end: Callable[[], object] = lambda: None
) -> Generator[R, None, None]:
    """``work(item)`` for each of ``items``, in order, in one thread while the caller makes the next item.

    An error of ``items`` is raised after the results of the items before it. Close the iterator to end the
    thread after the item that it is working on; ``end`` is called before, to hurry ``work``. Not
    ``threaded``: everything is done by the caller.
    """
    if not threaded:
        yield from map(work, items)
        return
    source = iter(items)
    failure: Exception | None = None
    pending: Future[R] | None = None
    thread = ThreadPoolExecutor(1, "behind")
    try:
        while failure is None:
            try:
                item = next(source)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            previous, pending = pending, thread.submit(work, item)
            if previous is not None:
                yield previous.result()
        if pending is not None:
            yield pending.result()
        if failure is not None:
            raise failure
    finally:
        end()
        thread.shutdown(cancel_futures=True)
