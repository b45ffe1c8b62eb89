"""A few threads work ahead while the network computes: they open and cut pictures, and tokenize.

    with ahead(make, items) as made:
        for thing in made: ...           thing = make(item), in the order of the items

See it: `pytest tests/test_ahead.py`.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item, Made = TypeVar("Item"), TypeVar("Made")
THREADS = min(4, os.cpu_count() or 1)
MOST = 8  # items that are made before they are needed: a record's pictures take up to 100 MB


@contextmanager
def ahead(make: Callable[[Item], Made], items: Iterable[Item], most: int = MOST) -> Iterator[Iterator[Made]]:
    """`make(item)` of each item, in their order. Items are taken in this thread, up to `most` ahead, and made in worker
    threads. An error in either is raised when its item's turn comes. After the block no new work starts."""
    threads = ThreadPoolExecutor(THREADS, "ahead")
    try:
        yield in_order(threads, make, iter(items), most)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def in_order(threads: ThreadPoolExecutor, make: Callable, items: Iterator, most: int) -> Iterator:
    made: deque[Future] = deque()
    for future in submitted(threads, make, items):
        made.append(future)
        if len(made) > most:
            yield made.popleft().result()
    while made:
        yield made.popleft().result()


def submitted(threads: ThreadPoolExecutor, make: Callable, items: Iterator) -> Iterator[Future]:
    """A future for each item; the last one may be the error that ended them."""
    while True:
        try:
            yield threads.submit(make, next(items))
        except StopIteration:
            return
        except Exception as error:
            failed: Future = Future()
            failed.set_exception(error)
            yield failed
            return
