"""Processes that work ahead in order, and outlive a job that kills one of them."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from fulmen.data.tokenise import start_worker

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers:
    """`num_workers` processes; 0 = this one.

    A file can crash a decoder, and the system kills what needs too much memory. The jobs that
    were under way then run anew, and the one that fails alone as well is given up.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None

    def map(
        self,
        function: Callable[[Job], Result],
        jobs: Iterable[Job],
        *,
        lost: Callable[[Job], Result],
    ) -> Iterator[Result]:
        """`function` of each job, in order; `lost` of one that kills its process.

        At most four jobs a process are under way or wait to be taken.
        """
        if not self._num_workers:
            yield from map(function, jobs)
            return
        under_way: deque[tuple[Job, Future[Result], ProcessPoolExecutor]] = deque()
        for job in jobs:
            under_way.append((job, *self._submit(function, job)))
            if len(under_way) >= 4 * self._num_workers:
                yield self._result(function, *under_way.popleft(), lost=lost)
        while under_way:
            yield self._result(function, *under_way.popleft(), lost=lost)

    def close(self) -> None:
        """End the processes; the next job would start new ones."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _submit(
        self, function: Callable[[Job], Result], job: Job
    ) -> tuple[Future[Result], ProcessPoolExecutor]:
        try:
            pool = self._open()
            return pool.submit(function, job), pool
        except BrokenProcessPool:
            self.close()
            pool = self._open()
            return pool.submit(function, job), pool

    def _open(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # spawn: threads of CUDA and of arrow may hold locks that fork would keep.
            self._pool = ProcessPoolExecutor(
                self._num_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=start_worker,
            )
        return self._pool

    def _result(
        self,
        function: Callable[[Job], Result],
        job: Job,
        future: "Future[Result]",
        pool: ProcessPoolExecutor,
        *,
        lost: Callable[[Job], Result],
    ) -> Result:
        try:
            return future.result()
        except BrokenProcessPool:
            if self._pool is pool:
                self.close()
        # Alone in a pool of one, so that no other job can be the cause.
        with ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
        ) as alone:
            try:
                return alone.submit(function, job).result()
            except BrokenProcessPool:
                return lost(job)
