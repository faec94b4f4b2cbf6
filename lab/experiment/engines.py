"""Engines: where runs take place. Independent payloads go through any executor of concurrent.futures.

    inline              one after the other in this process
    processes           a pool of spawned processes, one a processor; processes:N for N of them
    dask://host:port    a Dask cluster, by the address of its scheduler

A payload whose worker was killed is given to another worker. A pool of processes breaks as a whole when one of them
ends, and does not say which payload did it, so all that were lost are tried again: together at first, then each
alone, so that one that kills its worker each time is named and costs no other its result. A Dask scheduler does the
same by itself.

Only a bounded number is in flight. Whatever ends a run early (an error, Ctrl-C, a reader that stops reading) cancels
the rest and ends the pool's processes at once; if this process is killed outright, each worker notices and ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from common.errors import LabError, MachineError, PeerError, UsageError

__all__ = ["ADDRESSES", "Answer", "Engine", "Payload", "check_address", "open_engine"]

Payload = dict[str, Any]
Answer = dict[str, Any]

ADDRESSES = "inline, processes, processes:N or dask://host:port"
_LOSSES_TOGETHER = 2  # after so many a payload runs alone
_MOST_LOSSES = 4  # then it is the payload's own doing
_PROCESSES = re.compile(r"processes(?::([1-9][0-9]{0,3}))?")
_DASK = re.compile(r"dask://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_DASK_IN_FLIGHT = 256  # enough for a small fleet; what waits, waits at the scheduler
_DASK_TIMEOUT_S = 10.0


@dataclass
class _Job:
    """One payload on its way."""

    index: int
    payload: Payload
    losses: int = 0


class Engine:
    """Runs payloads through an executor. Made by ``open_engine`` or ``over``; one ``run`` at a time.

    Leaving the context waits for nothing that was not asked for: payloads still in flight are given up.
    """

    def __init__(self, *, in_flight: int) -> None:
        self._in_flight = in_flight
        self._executor: Executor | None = None
        self._pending: dict[Future[Answer], tuple[_Job, Executor]] = {}

    @classmethod
    def over(cls, executor: Executor, *, in_flight: int = 64) -> Engine:
        """An engine over an executor that the caller made and shuts down.

        Args:
            in_flight: most payloads submitted and not finished at a time.
        """
        return _ForeignEngine(executor, in_flight=in_flight)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(abandoned=error is not None)

    def close(self, *, abandoned: bool = False) -> None:
        """Give up what is in flight and end what belongs to this engine. May be called twice.

        Args:
            abandoned: end it at once, even if nothing is known to be in flight: an interrupt can come at any moment.
        """
        abandoned = self._cancel() or abandoned
        executor, self._executor = self._executor, None
        if executor is not None:
            self._stop(executor, abandoned=abandoned)

    def run(
        self,
        function: Callable[[Payload], Answer],
        payloads: Iterable[Payload],
        *,
        in_flight: int | None = None,
        describe: Callable[[int], str] = lambda index: f"payload {index}",
    ) -> Generator[tuple[int, Answer], None, None]:
        """Index and answer of each payload, each exactly once, in the order in which they finish.

        Args:
            function: top-level and picklable, and the same however often it is called: a payload whose worker was
                killed is run once more.
            payloads: taken as there is room, so they may be a generator.
            in_flight: at most so many at a time; that of the engine if None.
            describe: what an error calls a payload.

        Raises:
            LabError: the payload raised it (then of the same class), or its worker was killed again and again.
            PeerError: the cluster went away.
            Exception: the payload raised it; a note names the payload.
        """
        room = self._in_flight if in_flight is None else max(1, min(in_flight, self._in_flight))
        fresh = (_Job(index, payload) for index, payload in enumerate(payloads))
        lost: deque[_Job] = deque()
        finished: queue.SimpleQueue[Future[Answer]] = queue.SimpleQueue()
        try:
            while True:
                while len(self._pending) < room and (job := self._next(fresh, lost)) is not None:
                    if not self._submit(function, job, finished):
                        lost.append(job)
                if not self._pending:
                    if lost:
                        continue
                    return
                future = finished.get()
                job, executor = self._pending.pop(future)
                try:
                    answer = future.result()
                except BrokenExecutor as error:
                    self._lose(job, error, describe)
                    if executor is self._executor:  # and not a later one: each break is told once a payload
                        self._renew(error)
                    lost.append(job)
                except CancelledError as error:
                    raise PeerError(f"{describe(job.index)}: was cancelled: {self._who_cancels}") from error
                except Exception as error:
                    self._fail(job, error, describe)
                    raise
                else:
                    yield job.index, answer
        finally:
            if self._cancel() and (current := self._executor) is not None:
                self._executor = None
                self._stop(current, abandoned=True)

    _who_cancels = "its executor was shut down"

    def _next(self, fresh: Iterator[_Job], lost: deque[_Job]) -> _Job | None:
        """The next payload to submit, None when there is none or it has to wait for others to finish."""
        if any(job.losses > _LOSSES_TOGETHER for job, _ in self._pending.values()):
            return None
        if not lost:
            return next(fresh, None)
        if lost[0].losses > _LOSSES_TOGETHER and self._pending:
            return None
        return lost.popleft()

    def _submit(
        self, function: Callable[[Payload], Answer], job: _Job, finished: queue.SimpleQueue[Future[Answer]]
    ) -> bool:
        """Submit ``job``; False if the executor turned out to be broken, which costs the job no loss."""
        if self._executor is None:
            self._executor = self._open()
        try:
            future = self._submit_to(self._executor, function, job.payload)
        except BrokenExecutor as error:
            self._renew(error)
            return False
        self._pending[future] = job, self._executor
        future.add_done_callback(finished.put)
        return True

    def _submit_to(self, executor: Executor, function: Callable[[Payload], Answer], payload: Payload) -> Future[Answer]:
        return executor.submit(function, payload)

    def _lose(self, job: _Job, error: BrokenExecutor, describe: Callable[[int], str]) -> None:
        """A worker ended while ``job`` was in flight.

        Raises:
            LabError: once too often.
        """
        job.losses += 1
        if job.losses >= _MOST_LOSSES:
            raise LabError(
                f"{describe(job.index)}: its worker was killed {job.losses} times, the last time with nothing beside "
                "it; is there enough memory for it (dmesg shows what the kernel killed)?"
            ) from error

    def _renew(self, error: BrokenExecutor) -> None:
        """Take leave of a broken executor; the next payload opens another.

        Raises:
            PeerError: it is not this engine's to replace.
        """
        raise PeerError(f"the executor broke: {error}; open another one") from error

    def _fail(self, job: _Job, error: Exception, describe: Callable[[int], str]) -> None:
        """Name the payload of an error that it raised."""
        name = describe(job.index)
        if isinstance(error, LabError):
            raise type(error)(f"{name}: {error}") from error
        error.add_note(f"raised by {name}")

    def _cancel(self) -> bool:
        """Cancel what is in flight; True if there was something."""
        pending, self._pending = list(self._pending), {}
        for future in pending:
            future.cancel()
        return bool(pending)

    def _open(self) -> Executor:
        raise NotImplementedError

    def _stop(self, executor: Executor, *, abandoned: bool) -> None:
        """End ``executor``; at once and whatever it is doing if it was abandoned."""


class _ForeignEngine(Engine):
    """Over somebody else's executor, which outlives it."""

    def __init__(self, executor: Executor, *, in_flight: int) -> None:
        super().__init__(in_flight=in_flight)
        self._foreign = executor

    def _open(self) -> Executor:
        return self._foreign


class _Inline(Executor):
    """Runs each payload when it is submitted, in the thread that submits it."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """A future that is finished already."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  whoever reads the future gets it
            future.set_exception(error)
        return future


class _InlineEngine(Engine):
    def __init__(self) -> None:
        super().__init__(in_flight=1)

    def _open(self) -> Executor:
        return _Inline()


class _PoolEngine(Engine):
    """Spawned processes: they share no lock, thread or mapping with this one, as forked ones would."""

    def __init__(self, workers: int) -> None:
        super().__init__(in_flight=2 * workers)  # one at work and one at hand each
        self._workers = workers
        self._started: list[Any] = []

    def _open(self) -> Executor:
        from concurrent.futures import ProcessPoolExecutor

        context = _recording_context()
        self._started = context.started
        return ProcessPoolExecutor(self._workers, mp_context=context, initializer=_begin_worker)

    def _submit_to(self, executor: Executor, function: Callable[[Payload], Answer], payload: Payload) -> Future[Answer]:
        # Submitting starts a worker where one is missing. It inherits the mask, so a Ctrl-C at the terminal, which
        # reaches the whole process group, does not meet it before it ignores the signal.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return executor.submit(function, payload)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _renew(self, error: BrokenExecutor) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            self._stop(executor, abandoned=True)
        del error

    def _stop(self, executor: Executor, *, abandoned: bool) -> None:
        if abandoned:
            for process in self._started:
                with contextlib.suppress(ValueError):  # the executor has closed it already
                    process.kill()
        executor.shutdown(wait=True, cancel_futures=True)


def _recording_context() -> Any:
    """The context "spawn" with ``started``: the processes that an executor starts in it, which it does not tell."""
    from multiprocessing.context import SpawnContext, SpawnProcess

    class Recording(SpawnContext):
        def __init__(self) -> None:
            super().__init__()
            self.started: list[SpawnProcess] = []

        def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
            process = SpawnProcess(*args, **kwargs)
            self.started.append(process)
            return process

    return Recording()


def _begin_worker() -> None:
    """Let the parent decide when this worker ends, and end with it however it ends."""
    import threading
    from multiprocessing import connection, parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])  # a pipe of which the parent alone has the other end
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


class _DaskEngine(Engine):
    """A Dask cluster. Its scheduler gives what a killed worker had to another one."""

    _who_cancels = "the scheduler went away"

    def __init__(self, address: str, host: str, port: int) -> None:
        super().__init__(in_flight=_DASK_IN_FLIGHT)
        try:
            import distributed
        except ImportError as error:
            raise MachineError(f"{address}: distributed is not installed; pip install fpr-lab[dask]") from error
        self._killed: type[Exception] = distributed.KilledWorker
        scheduler = f"tcp://{host}:{port}"
        try:
            _ask_scheduler(scheduler)
            self._client: Any = distributed.Client(scheduler, timeout=_DASK_TIMEOUT_S, set_as_default=False)
        except OSError as error:  # TimeoutError is one
            raise PeerError(f"{address}: no scheduler answers; start one: dask scheduler --port {port}") from error
        try:
            self._client.wait_for_workers(1, timeout=_DASK_TIMEOUT_S)
        except TimeoutError as error:
            self._client.close()
            raise PeerError(f"{address}: has no workers; start some: dask worker {scheduler}") from error
        except BaseException:
            self._client.close()
            raise

    def close(self, *, abandoned: bool = False) -> None:
        """See ``Engine``; leaves the cluster."""
        super().close(abandoned=abandoned)
        self._client.close()

    def _open(self) -> Executor:
        executor: Executor = self._client.get_executor(pure=False)  # each payload is a run of its own
        return executor

    def _fail(self, job: _Job, error: Exception, describe: Callable[[int], str]) -> None:
        if isinstance(error, self._killed):
            raise LabError(
                f"{describe(job.index)}: its worker was killed each time it was tried; is there enough memory for it?"
            ) from error
        super()._fail(job, error, describe)

    def _stop(self, executor: Executor, *, abandoned: bool) -> None:
        executor.shutdown(wait=not abandoned)


def _ask_scheduler(address: str) -> None:
    """Return once the scheduler has answered. A client by itself waits for ever for one that only listens.

    Raises:
        TimeoutError: it has not within some seconds.
    """
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from distributed.core import rpc

    async def ask() -> None:
        async with rpc(address) as scheduler:
            await scheduler.identity()

    # In a thread of its own, because the caller's may have an event loop already, as that of a notebook has.
    with ThreadPoolExecutor(1) as helper:
        helper.submit(lambda: asyncio.run(asyncio.wait_for(ask(), _DASK_TIMEOUT_S))).result()


def check_address(address: str) -> str:
    """``address`` itself if it has the form of one.

    Raises:
        UsageError: it has not.
    """
    port = match[2] if (match := _DASK.fullmatch(address)) else "1"
    if address != "inline" and not _PROCESSES.fullmatch(address) and (match is None or not 0 < int(port) < 1 << 16):
        raise UsageError(f"--engine: {address!r}; allowed is {ADDRESSES}")
    return address


def open_engine(address: str) -> Engine:
    """The engine at ``address``, one of ``ADDRESSES``; a context manager.

    Raises:
        UsageError: another address.
        MachineError: it needs a package that is not installed; names it.
        PeerError: no scheduler, or none with workers, answers there within some seconds.
    """
    check_address(address)
    if address == "inline":
        return _InlineEngine()
    if (pool := _PROCESSES.fullmatch(address)) is not None:
        return _PoolEngine(int(pool[1] or len(os.sched_getaffinity(0))))
    cluster = _DASK.fullmatch(address)
    assert cluster is not None
    return _DaskEngine(address, cluster[1], int(cluster[2]))
