"""Engines: every payload's answer exactly once, whoever is killed meanwhile, and nothing left running."""

from __future__ import annotations

import builtins
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.errors import InvariantViolation, LabError, MachineError, PeerError, UsageError
from lab.experiment import engines
from lab.experiment.engines import Engine, open_engine
from tests.lab.work import failing, is_gone, killed, square, square_once_killed, waiting
from tests.support import wait_until

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ("inline", "processes:2")


def payloads(count: int) -> list[dict[str, Any]]:
    return [{"value": value} for value in range(count)]


def squares(count: int) -> dict[int, dict[str, Any]]:
    """What ``square`` answers inline."""
    with open_engine("inline") as engine:
        return dict(engine.run(square, payloads(count)))


def collected(answers: Iterator[tuple[int, Any]]) -> dict[int, Any]:
    """Answers by index; an index that comes twice fails."""
    found: dict[int, Any] = {}
    for index, answer in answers:
        assert index not in found
        found[index] = answer
    return found


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Every process that a test starts through multiprocessing has ended when it ends."""
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("address", LOCAL)
def test_every_answer_comes_once_and_an_engine_can_be_used_again(address: str) -> None:
    with open_engine(address) as engine:
        assert collected(engine.run(square, payloads(9))) == {value: {"value": value**2} for value in range(9)}
        assert collected(engine.run(square, [])) == {}
        assert collected(engine.run(square, payloads(2))) == squares(2)


def test_any_executor_will_do_and_stays_open() -> None:
    with ThreadPoolExecutor(3) as executor:
        with Engine.over(executor) as engine:
            assert collected(engine.run(square, payloads(20))) == squares(20)
        assert executor.submit(square, {"value": 5}).result() == {"value": 25}


class Counting(Executor):
    """Finishes the last of four futures that are in flight, and none before; remembers how many there were at most."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Any]] = []
        self.most = 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, function(*args)))
        self.most = max(self.most, len(self.waiting))
        if len(self.waiting) == 4:
            last, answer = self.waiting.pop()
            last.set_result(answer)
        return future


def test_no_more_than_the_bound_is_in_flight_and_payloads_are_taken_as_there_is_room() -> None:
    taken: list[int] = []

    def endless() -> Iterator[dict[str, Any]]:
        value = 0
        while True:
            taken.append(value)
            yield {"value": value}
            value += 1

    executor = Counting()
    with Engine.over(executor, in_flight=4) as engine:
        answers = engine.run(square, endless())
        assert [next(answers)[0] for _ in range(50)] == list(range(3, 53))  # in order of completion: the last first
        answers.close()
    assert executor.most == 4
    assert len(taken) == 53
    assert all(future.cancelled() for future, _ in executor.waiting)


# A worker is killed


def test_a_killed_worker_of_the_pool_costs_no_result(tmp_path: Path) -> None:
    work = payloads(24)
    work[5]["marker"] = str(tmp_path / "killed")
    with open_engine("processes:2") as engine:
        assert collected(engine.run(square_once_killed, work)) == squares(24)
    assert (tmp_path / "killed").exists()


def test_workers_killed_one_after_the_other_cost_no_result(tmp_path: Path) -> None:
    work = payloads(16)
    for value in (0, 1, 7, 15):
        work[value]["marker"] = str(tmp_path / f"killed-{value}")
    with open_engine("processes:2") as engine:
        assert collected(engine.run(square_once_killed, work)) == squares(16)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_payload_that_kills_its_worker_each_time_is_named_and_no_other() -> None:
    with open_engine("processes:2") as engine:
        with pytest.raises(LabError, match="run of seed 3: its worker was killed 4 times"):
            collected(engine.run(killed, payloads(6), describe=lambda index: f"run of seed {index}"))
        assert collected(engine.run(square, payloads(3))) == squares(3)


# A payload fails


@pytest.mark.parametrize("address", LOCAL)
def test_an_error_of_a_payload_names_it_and_keeps_its_class(address: str) -> None:
    with open_engine(address) as engine:
        with pytest.raises(InvariantViolation, match="payload 0: S3: a block is in flight"):
            collected(engine.run(failing, [{"value": 5}]))
        with pytest.raises(ZeroDivisionError, match="by nothing") as caught:
            collected(engine.run(failing, payloads(4)))
        assert caught.value.__notes__[-1] == "raised by payload 3"
        assert collected(engine.run(failing, payloads(3))) == squares(3)


def test_an_error_ends_payloads_that_are_at_work(tmp_path: Path) -> None:
    work: list[dict[str, Any]] = [{"value": 1, "folder": str(tmp_path)}, {"value": 0}]

    with open_engine("processes:2") as engine:
        answers = engine.run(waiting, work)
        assert next(answers) == (1, {"value": 0})
        wait_until(lambda: len(os.listdir(tmp_path)) == 1, what="the worker that waits")
        answers.close()
        assert all(is_gone(int(name)) for name in os.listdir(tmp_path))


# This process is interrupted or killed


def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    work = [{"value": value, "folder": str(tmp_path)} for value in (1, 2)]

    def interrupt() -> None:
        wait_until(lambda: len(os.listdir(tmp_path)) == 2, 60, what="both workers at work")
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(KeyboardInterrupt), open_engine("processes:2") as engine:
        collected(engine.run(waiting, work))
    helper.join()
    assert all(is_gone(int(name)) for name in os.listdir(tmp_path))


PROGRAM = """
import sys
from lab.experiment.engines import open_engine
from tests.lab.work import waiting
work = [{"value": value, "folder": sys.argv[1]} for value in (1, 2)]
with open_engine("processes:2") as engine:
    for _ in engine.run(waiting, work):
        pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            wait_until(lambda: len(os.listdir(tmp_path)) == 2, 60, what="both workers at work")
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does
            else:
                process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    workers = [int(name) for name in os.listdir(tmp_path)]
    wait_until(lambda: all(is_gone(pid) for pid in workers), what="the end of both workers")
    if number == signal.SIGINT:
        assert said.count("KeyboardInterrupt") == 1, said  # the workers themselves have nothing to say


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        *("", "process", "processes:", "processes:0", "processes:-1", "inline:2", "dask://", "dask://host"),
        *("dask://h:0", "dask://h:70000", "dask://h:80/x", "tcp://h:80"),
    ],
)
def test_another_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"allowed is inline, processes, processes:N or dask://host:port"):
        open_engine(address)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "distributed":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MachineError, match=r"pip install fpr-lab\[dask\]"):
        open_engine("dask://127.0.0.1:8786")


# Dask


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """A real cluster on this machine: a scheduler and two worker processes."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        worker_dashboard_address="127.0.0.1:0",
        local_directory=str(tmp_path / "dask"),
        silence_logs=logging.CRITICAL,
    ) as local:
        yield local


def address_of(cluster: Any) -> str:
    return str(cluster.scheduler_address).replace("tcp://", "dask://")


def test_a_killed_worker_of_a_dask_cluster_costs_no_result(cluster: Any, tmp_path: Path) -> None:
    work = payloads(24)
    work[5]["marker"] = str(tmp_path / "killed")
    with open_engine(address_of(cluster)) as engine:
        assert collected(engine.run(square_once_killed, work)) == squares(24)
        assert (tmp_path / "killed").exists()
        with pytest.raises(InvariantViolation, match="payload 0: S3: a block is in flight"):
            collected(engine.run(failing, [{"value": 5}]))
        assert collected(engine.run(square, payloads(3))) == squares(3)


@pytest.mark.parametrize("listening", [False, True])
def test_a_scheduler_that_does_not_answer_is_told_soon(monkeypatch: pytest.MonkeyPatch, listening: bool) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(engines, "_DASK_TIMEOUT_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not listening:
            server.close()
        with pytest.raises(PeerError, match="no scheduler answers; start one: dask scheduler --port"):
            open_engine(f"dask://127.0.0.1:{port}")


def test_a_scheduler_without_workers_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL
    ) as cluster:
        monkeypatch.setattr(engines, "_DASK_TIMEOUT_S", 3.0)
        with pytest.raises(PeerError, match="has no workers; start some: dask worker tcp://127"):
            open_engine(address_of(cluster))


def test_a_cluster_that_goes_away_is_an_error_and_no_endless_wait(cluster: Any, tmp_path: Path) -> None:
    work = [{"value": value, "folder": str(tmp_path)} for value in (0, 1)]
    with open_engine(address_of(cluster)) as engine:
        answers = engine.run(waiting, work)
        assert next(answers) == (0, {"value": 0})
        helper = threading.Thread(target=cluster.close)
        helper.start()
        with pytest.raises(PeerError, match="payload 1: was cancelled: the scheduler went away"):
            next(answers)
        helper.join()
