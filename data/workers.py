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
        self._single: ProcessPoolExecutor | None = None

    def map(
        self,
        function: Callable[[Job], Result],
        jobs: Iterable[Job],
        *,
        lost: Callable[[Job], Result],
        ahead: int = 4,
    ) -> Iterator[Result]:
        """`function` of each job, in order; `lost` of one that kills its process.

        At most `ahead` jobs a process are under way or wait to be taken.
        """
        if not self._num_workers:
            yield from map(function, jobs)
            return
        under_way: deque[tuple[Job, Future[Result], ProcessPoolExecutor]] = deque()
        for job in jobs:
            under_way.append((job, *self._submit(function, job)))
            if len(under_way) >= ahead * self._num_workers:
                yield self._result(function, *under_way.popleft(), lost=lost)
        while under_way:
            yield self._result(function, *under_way.popleft(), lost=lost)

    def close(self) -> None:
        """End the processes; the next job would start new ones."""
        for pool in (self._pool, self._single):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._single = None

    def _submit(
        self, function: Callable[[Job], Result], job: Job
    ) -> tuple[Future[Result], ProcessPoolExecutor]:
        for _ in range(2):
            self._pool = self._pool or _start(self._num_workers)
            try:
                return self._pool.submit(function, job), self._pool
            except BrokenProcessPool:
                self._pool = None
        raise RuntimeError("the worker processes die as soon as they start")

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
                self._pool = None
        # In a process by itself, so that no other job can be the cause.
        self._single = self._single or _start(1)
        try:
            return self._single.submit(function, job).result()
        except BrokenProcessPool:
            self._single = None
            return lost(job)


def _start(num_workers: int) -> ProcessPoolExecutor:
    # spawn: threads of CUDA and of arrow may hold locks that fork would keep.
    return ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
    )
