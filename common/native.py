"""The boundary between Python and compiled code: the kernel decorator and the few things Numba has no word for.

Everything that runs with a lock held, and everything hot, is Python compiled by Numba without the GIL. A kernel takes
arrays and integers, decides nothing by a clock, cannot raise, and does a bounded amount of work. With
``NUMBA_DISABLE_JIT=1`` the same functions run as plain Python (slow, for tests): each primitive here has a twin.

Numba's on-disk cache notices a change in a kernel's own file but not in the files of the functions that it calls. The
cache therefore lives in folders named after a hash of the sources: one for the kernels of ``common`` and ``guest``, and
one for those of ``lab`` and ``benchmarks``, which call them and are called by none of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import select
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba as _numba
import numpy as np
from llvmlite import ir
from numba import types as _types
from numba.extending import intrinsic as _intrinsic

from common import faults
from common.geometry import DEFAULT_PAGEBLOCK_ORDER, PAGEBLOCK_ORDER

__all__ = [
    "JIT",
    "barrier",
    "clock_ns",
    "exchange_i64",
    "exchange_u16",
    "fault_point",
    "kernel",
    "libc",
    "load_i64",
    "mutex_consistent",
    "mutex_lock",
    "mutex_unlock",
    "prefetch",
    "semaphore_post",
    "semaphore_try",
    "semaphore_wait",
    "semaphore_wait_us",
    "sleep_us",
    "store_i64",
    "thread_id",
    "thread_is_gone",
    "view_i64",
    "view_u8",
    "view_u16",
    "view_u32",
    "word_address",
]

# Numba types its functions by itself; to mypy they are Any.
numba: Any = _numba
types: Any = _types
intrinsic: Any = _intrinsic

libc = ctypes.CDLL(None, use_errno=True)
_CACHE_KEPT_S = 30 * 24 * 3600
_CLOCK_MONOTONIC = time.CLOCK_MONOTONIC
# glibc has it since 2.30. Without it a timed wait of the C library goes by the wall clock, which may be set back by an
# hour and the wait with it: then the semaphore is looked at again and again instead.
_HAS_CLOCKWAIT = hasattr(libc, "sem_clockwait")
_LOOK_US = 200
_NR_PIDFD_OPEN = 434  # one number for all architectures but alpha: scripts/syscall.tbl
_POLLIN = select.POLLIN


_INNER, _OUTER = ("common", "guest"), ("common", "guest", "lab", "benchmarks")


def _cache_folder(packages: tuple[str, ...]) -> Path:
    """Folder for the compiled kernels of these packages, named after the hash of every source that takes part."""
    root = Path(__file__).resolve().parents[1]
    key = f"{numba.__version__} {numba.config.BOUNDSCHECK} {faults.IN_KERNELS} {_HAS_CLOCKWAIT} {root}"
    if PAGEBLOCK_ORDER != DEFAULT_PAGEBLOCK_ORDER:  # what the environment makes of a constant
        key += f" {PAGEBLOCK_ORDER}"
    digest = hashlib.sha256(key.encode())
    for folder in packages:
        for source in sorted((root / folder).rglob("*.py")):
            text = source.read_bytes()
            if folder == "common" or b"@kernel" in text:  # common: the constants that kernels are compiled with
                digest.update(text)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpr-lab"
    return base / digest.hexdigest()[:16]


def _prepare_cache() -> tuple[str, str] | None:
    """Make the two folders, and drop those of sources that nobody has used for a month.

    None where the home cannot be written: kernels are then compiled anew in each process.
    """
    try:
        inner, outer = _cache_folder(_INNER), _cache_folder(_OUTER)
        for folder in (inner, outer):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.utime(folder)
            with tempfile.TemporaryFile(dir=folder):
                pass
        for other in inner.parent.iterdir():
            if time.time() - other.stat().st_mtime > _CACHE_KEPT_S:
                shutil.rmtree(other, ignore_errors=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home at all
        return None
    return str(inner), str(outer)


def _forgive_a_full_cache() -> None:
    """A kernel that cannot be kept (space, quota, a folder that was removed) runs all the same; said once."""
    from numba.core import caching

    kept: Any = caching.Cache
    save = kept.save_overload
    told: list[OSError] = []

    def save_or_go_on(cache: Any, signature: Any, data: Any) -> None:
        try:
            save(cache, signature, data)
        except OSError as error:
            if not told and sys.stderr is not None:
                with contextlib.suppress(OSError):
                    sys.stderr.write(
                        f"kernels are not kept in {numba.config.CACHE_DIR}: {error.strerror}; free some space there, "
                        "or name another folder with XDG_CACHE_HOME\n"
                    )
            told.append(error)

    kept.save_overload = save_or_go_on


JIT = not numba.config.DISABLE_JIT
_FOLDERS = _prepare_cache() if JIT else None
CACHED = _FOLDERS is not None
if _FOLDERS is not None:
    numba.config.CACHE_DIR = _FOLDERS[0]
    _forgive_a_full_cache()


def kernel(function: Any) -> Any:
    """Compile ``function`` at its first call with given types, and keep the result on disk.

    nogil: it runs while other threads do. error_model numpy: no ZeroDivisionError, so that nothing can raise between
    lock and unlock. no_cfunc_wrapper: nobody calls it from C, and to compile a wrapper for that takes time.
    """
    compiled = numba.njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True)(function)
    if _FOLDERS is not None:
        numba.config.CACHE_DIR = _FOLDERS[function.__module__.partition(".")[0] in {"lab", "benchmarks"}]
        compiled.enable_caching()
        numba.config.CACHE_DIR = _FOLDERS[0]
    return compiled


mutex_lock: Any
mutex_unlock: Any
mutex_consistent: Any
semaphore_post: Any
semaphore_try: Any
semaphore_wait: Any
semaphore_wait_us: Any
barrier: Any
exchange_i64: Any
exchange_u16: Any
fault_point: Any
load_i64: Any
sleep_us: Any
store_i64: Any
thread_id: Any
thread_is_gone: Any
prefetch: Any
clock_ns: Any
view_i64: Any
view_u32: Any
word_address: Any
view_u16: Any
view_u8: Any

if JIT:
    # SAFETY: external symbols are resolved by name in the C library (ctypes pointers cannot be cached). Callers pass
    # addresses inside a mapped segment, which the handle that owns the mapping keeps alive during the call.
    mutex_lock = types.ExternalFunction("pthread_mutex_lock", types.int32(types.uintp))
    mutex_unlock = types.ExternalFunction("pthread_mutex_unlock", types.int32(types.uintp))
    mutex_consistent = types.ExternalFunction("pthread_mutex_consistent", types.int32(types.uintp))
    semaphore_post = types.ExternalFunction("sem_post", types.int32(types.uintp))
    semaphore_try = types.ExternalFunction("sem_trywait", types.int32(types.uintp))
    semaphore_wait = types.ExternalFunction("sem_wait", types.int32(types.uintp))
    _semaphore_clockwait = types.ExternalFunction("sem_clockwait", types.int32(types.uintp, types.int32, types.uintp))
    _clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uintp))

    @intrinsic
    def _pointer(_context: Any, _address: Any) -> Any:
        """The integer given as a void pointer."""

        def build(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

        return types.voidptr(types.uintp), build

    @intrinsic
    def prefetch(_context: Any, _address: Any) -> Any:
        """Ask for the cache line at an address; never faults, whatever the address."""

        def build(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            byte_pointer = ir.IntType(8).as_pointer()
            word = ir.IntType(32)
            function = builder.module.declare_intrinsic(
                "llvm.prefetch", [byte_pointer], ir.FunctionType(ir.VoidType(), [byte_pointer, word, word, word])
            )
            for_write, keep_in_all_levels, data = word(1), word(3), word(1)
            pointer = builder.inttoptr(args[0], byte_pointer)
            builder.call(function, [pointer, for_write, keep_in_all_levels, data])
            return context.get_dummy_value()

        return types.void(types.intp), build

    _kill = types.ExternalFunction("kill", types.int32(types.int32, types.int32))
    _syscall = types.ExternalFunction("syscall", types.int64(types.int64, types.int64, types.int64))
    _poll = types.ExternalFunction("poll", types.int32(types.uintp, types.uint64, types.int32))
    _close = types.ExternalFunction("close", types.int32(types.int32))
    thread_id = types.ExternalFunction("gettid", types.int32())
    _usleep = types.ExternalFunction("usleep", types.int32(types.uint32))

    @intrinsic
    def exchange_i64(_context: Any, _address: Any, _expected: Any, _replacement: Any) -> Any:
        """Replace the int64 at an address if it is as expected, atomically; True if it was (cmpxchg)."""

        def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
            answer = builder.cmpxchg(pointer, args[1], args[2], "acq_rel", "acquire")
            return builder.extract_value(answer, 1)

        return types.boolean(types.int64, types.int64, types.int64), build

    @intrinsic
    def barrier(_context: Any) -> Any:
        """Keep the compiler from moving loads and stores across this point; costs nothing at run time.

        A process can be killed between any two instructions; what is in memory then is what repair has to go by.
        """

        def build(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
            builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
            return context.get_dummy_value()

        return types.void(), build

    if faults.IN_KERNELS:
        # A symbol of our own: a call through an address could not be cached. It takes the GIL, which no thread keeps
        # while it waits for a lock of a zone: those that do are in kernels.
        _hit = ctypes.CFUNCTYPE(None, ctypes.c_int64)(faults.hit)
        llvmlite.binding.add_symbol("fpr_fault_point", ctypes.cast(_hit, ctypes.c_void_p).value)
        fault_point = types.ExternalFunction("fpr_fault_point", types.void(types.int64))
    else:

        @numba.njit(nogil=True, cache=CACHED)
        def fault_point(_number: int) -> None:
            """A place named in ``common.faults``: nothing, where tests have not asked for one."""

    @intrinsic
    def load_i64(_context: Any, _address: Any) -> Any:
        """The int64 at an address, read anew each time (acquire)."""

        def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
            return builder.load_atomic(pointer, "acquire", 8)

        return types.int64(types.int64), build

    @intrinsic
    def store_i64(_context: Any, _address: Any, _value: Any) -> Any:
        """Store an int64 at an address after all that was stored before (release)."""

        def build(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
            builder.store_atomic(args[1], pointer, "release", 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), build

    @numba.njit(nogil=True, cache=CACHED)
    def thread_is_gone(thread: int) -> Any:
        """True when no thread of that id runs any more, a process that nobody has waited for included."""
        if _kill(np.int32(thread), np.int32(0)) != 0:
            return True  # ESRCH: all who attach are of one user, so never EPERM
        # kill() answers for a zombie too. A pidfd, which only the first thread of a process has, tells.
        descriptor = _syscall(_NR_PIDFD_OPEN, np.int64(thread), np.int64(0))
        if descriptor < 0:
            return False
        request = np.empty(1, dtype=np.int64)  # struct pollfd: int fd, short events, short revents
        request[0] = descriptor | (_POLLIN << 32)
        # SAFETY: poll() reads and writes the eight bytes of our own array.
        _poll(np.uintp(request.ctypes.data), np.uint64(1), np.int32(0))
        _close(np.int32(descriptor))
        return (request[0] >> 48) & _POLLIN != 0

    @numba.njit(nogil=True, cache=CACHED)
    def sleep_us(microseconds: int) -> None:
        """Sleep, for a waiter whose turn does not come."""
        _usleep(np.uint32(microseconds))

    @intrinsic
    def exchange_u16(_context: Any, _address: Any, _expected: Any, _replacement: Any) -> Any:
        """Replace the uint16 at an address if it is as expected, atomically; True if it was (cmpxchg)."""

        def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            half = ir.IntType(16)
            pointer = builder.inttoptr(args[0], half.as_pointer())
            expected, replacement = builder.trunc(args[1], half), builder.trunc(args[2], half)
            answer = builder.cmpxchg(pointer, expected, replacement, "acq_rel", "acquire")
            return builder.extract_value(answer, 1)

        return types.boolean(types.int64, types.int64, types.int64), build

    @numba.njit(nogil=True, cache=CACHED)
    def view_i64(address: int, length: int) -> Any:
        """int64 array of ``length`` items over raw memory at ``address`` (8-byte aligned)."""
        return numba.carray(_pointer(np.uintp(address)), length, np.int64)

    @numba.njit(nogil=True, cache=CACHED)
    def view_u32(address: int, length: int) -> Any:
        """uint32 array over raw memory."""
        return numba.carray(_pointer(np.uintp(address)), length, np.uint32)

    @numba.njit(nogil=True, cache=CACHED)
    def view_u16(address: int, length: int) -> Any:
        """uint16 array over raw memory."""
        return numba.carray(_pointer(np.uintp(address)), length, np.uint16)

    @numba.njit(nogil=True, cache=CACHED)
    def view_u8(address: int, length: int) -> Any:
        """uint8 array over raw memory."""
        return numba.carray(_pointer(np.uintp(address)), length, np.uint8)

    @numba.njit(nogil=True, cache=CACHED)
    def clock_ns(scratch: Any) -> int:
        """CLOCK_MONOTONIC in ns. ``scratch``: int64[2] of the calling thread. For histograms only, never to decide."""
        # SAFETY: the timespec is written into the caller's own array of two words.
        _clock_gettime(np.int32(_CLOCK_MONOTONIC), np.uintp(scratch.ctypes.data))
        return int(scratch[0] * 1_000_000_000 + scratch[1])

    if _HAS_CLOCKWAIT:

        @numba.njit(nogil=True, cache=CACHED)
        def semaphore_wait_us(address: int, microseconds: int, scratch: Any) -> Any:
            """Take one from the semaphore at ``address``, sleeping some microseconds at most; True if it was taken.

            ``scratch``: int64[2] of the calling thread. By the monotonic clock; a signal may end it early.
            """
            # SAFETY: the timespec lies in the caller's own array of two words.
            _clock_gettime(np.int32(_CLOCK_MONOTONIC), np.uintp(scratch.ctypes.data))
            nanoseconds = scratch[1] + microseconds * 1000
            scratch[0] += nanoseconds // 1_000_000_000
            scratch[1] = nanoseconds % 1_000_000_000
            deadline = np.uintp(scratch.ctypes.data)
            return _semaphore_clockwait(np.uintp(address), np.int32(_CLOCK_MONOTONIC), deadline) == 0

    else:

        @numba.njit(nogil=True, cache=CACHED)
        def semaphore_wait_us(address: int, microseconds: int, scratch: Any) -> Any:
            """As above, where the C library waits by the wall clock alone: looks every 0.2 ms."""
            end = clock_ns(scratch) + microseconds * 1000
            while semaphore_try(np.uintp(address)) != 0:
                if clock_ns(scratch) >= end:
                    return False
                _usleep(np.uint32(_LOOK_US))
            return True

    @numba.njit(nogil=True, cache=CACHED)
    def word_address(address: int, word: int) -> Any:
        """Address of word ``word`` of the segment at ``address``, as the external functions want it."""
        return np.uintp(address + 8 * word)

else:

    def _libc_call(name: str) -> Any:
        function = getattr(libc, name)
        function.argtypes = [ctypes.c_void_p]
        function.restype = ctypes.c_int
        return function

    mutex_lock = _libc_call("pthread_mutex_lock")
    mutex_unlock = _libc_call("pthread_mutex_unlock")
    mutex_consistent = _libc_call("pthread_mutex_consistent")
    semaphore_post = _libc_call("sem_post")
    semaphore_try = _libc_call("sem_trywait")
    semaphore_wait = _libc_call("sem_wait")

    def semaphore_wait_us(address: int, microseconds: int, scratch: Any) -> bool:
        """Take one from the semaphore at ``address``, sleeping some microseconds at most; True if it was taken."""
        del scratch
        end = time.monotonic_ns() + int(microseconds) * 1000
        while semaphore_try(int(address)):
            if time.monotonic_ns() >= end:
                return False
            time.sleep(_LOOK_US / 1e6)
        return True

    def prefetch(address: int) -> None:
        """Nothing to do without compiled code: the interpreter's own misses dwarf these."""
        with contextlib.suppress(TypeError):
            del address

    thread_id = threading.get_native_id

    def exchange_i64(address: int, expected: int, replacement: int) -> bool:
        """Replace the int64 at an address if it is as expected; the GIL makes it near enough atomic for tests."""
        # SAFETY: the caller vouches for the address, as in compiled code.
        word = ctypes.c_int64.from_address(int(address))
        if word.value != int(expected):
            return False
        word.value = int(replacement)
        return True

    def barrier() -> None:
        """Plain Python does things in the order in which they are written."""

    if faults.ARMED:
        fault_point = faults.hit
    else:

        def fault_point(_number: int) -> None:
            """A place named in ``common.faults``: nothing, where tests have not asked for one."""

    def load_i64(address: int) -> int:
        """The int64 at an address."""
        return ctypes.c_int64.from_address(int(address)).value

    def store_i64(address: int, value: int) -> None:
        """Store an int64 at an address."""
        ctypes.c_int64.from_address(int(address)).value = int(value)

    def thread_is_gone(thread: int) -> bool:
        """True when no thread of that id runs any more, a process that nobody has waited for included."""
        try:
            os.kill(int(thread), 0)
            descriptor = os.pidfd_open(int(thread))
        except ProcessLookupError:
            return True
        except OSError:
            return False
        try:
            return bool(select.select([descriptor], [], [], 0)[0])
        finally:
            os.close(descriptor)

    def sleep_us(microseconds: int) -> None:
        """Sleep, for a waiter whose turn does not come."""
        time.sleep(microseconds / 1e6)

    def exchange_u16(address: int, expected: int, replacement: int) -> bool:
        """Replace the uint16 at an address if it is as expected; the GIL makes it near enough atomic for tests."""
        # SAFETY: the caller vouches for the address, as in compiled code.
        word = ctypes.c_uint16.from_address(int(address))
        if word.value != int(expected):
            return False
        word.value = int(replacement)
        return True

    def _view(address: int, length: int, dtype: Any) -> Any:
        # SAFETY: the caller vouches for the mapping, as in compiled code.
        raw = (ctypes.c_char * (int(length) * np.dtype(dtype).itemsize)).from_address(int(address))
        return np.frombuffer(raw, dtype=dtype)

    def word_address(address: int, word: int) -> Any:
        """Address of word ``word`` of the segment at ``address``."""
        return int(address) + 8 * int(word)

    def view_i64(address: int, length: int) -> Any:
        """int64 array of ``length`` items over raw memory at ``address``."""
        return _view(address, length, np.int64)

    def view_u32(address: int, length: int) -> Any:
        """uint32 array over raw memory."""
        return _view(address, length, np.uint32)

    def view_u16(address: int, length: int) -> Any:
        """uint16 array over raw memory."""
        return _view(address, length, np.uint16)

    def view_u8(address: int, length: int) -> Any:
        """uint8 array over raw memory."""
        return _view(address, length, np.uint8)

    def clock_ns(_scratch: Any) -> int:
        """CLOCK_MONOTONIC in ns."""
        return time.monotonic_ns()
