"""The threads that keep tensors, disk and hashing off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from fed_server.store.base import Store, Transaction

T = TypeVar("T")
P = ParamSpec("P")


class Workers:
    """One thread for the store, so that transactions never wait for each other's locks; a few for disk and hashing; a few for
    tensors. Each of torch's operations runs on one thread: updates are folded side by side instead."""

    def __init__(self, store: Store, *, num_disk_threads: int, num_compute_threads: int) -> None:
        self._store = store
        self._store_thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._disk_threads = ThreadPoolExecutor(num_disk_threads, thread_name_prefix="disk")
        self._compute_threads = ThreadPoolExecutor(num_compute_threads, thread_name_prefix="compute")

    async def store(self, work: Callable[[Transaction], T]) -> T:
        """Runs `work` in one transaction; what it wrote is durable when this returns."""

        def transact() -> T:
            with self._store.transaction() as transaction:
                return work(transaction)

        return await asyncio.get_running_loop().run_in_executor(self._store_thread, transact)

    async def disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs file work and hashing."""
        return await asyncio.get_running_loop().run_in_executor(self._disk_threads, lambda: work(*args, **kwargs))

    async def compute(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs tensor work."""
        return await asyncio.get_running_loop().run_in_executor(self._compute_threads, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Waits for what runs, then ends the threads and the store."""
        for pool in (self._disk_threads, self._compute_threads, self._store_thread):
            pool.shutdown(wait=True, cancel_futures=True)
        self._store.close()
