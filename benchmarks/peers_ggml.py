"""ggml's linear layers through ctypes, where a build of ggml is found: Q4_0 in its repacked layout, and Q8_0.

Set NARROWCAST_GGML to the folder that holds libggml-base.so and libggml-cpu.so of a shared-library build (they may lie
in folders below it). Weights of Q4_0 live in the CPU_REPACK buffer, which interleaves eight rows; on x86 ggml has no
such layout for Q8_0. Threads are a pool of ggml's own; they look for work about a millisecond longer and then sleep.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.linear_problem import INT4, INT8, Contender, Prepare, Problem
from benchmarks.peers import UnavailableError
from benchmarks.timing import Call

VARIABLE = "NARROWCAST_GGML"
F32, Q4_0, Q8_0 = 0, 2, 8  # enum ggml_type
BLOCK = 32
BLOCK_BYTES = {Q4_0: 18, Q8_0: 34}
REPACKED_ROWS = 8
POLL = 1  # of 100: a thread looks for work about a millisecond before it sleeps, so that it disturbs no other peer
CONTEXT_BYTES = 1 << 20  # descriptions of tensors only; data lies in buffers of the backend


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class ThreadpoolParams(ctypes.Structure):
    """struct ggml_threadpool_params."""

    _fields_ = (
        *(("cpumask", c_bool * 512), ("n_threads", c_int), ("prio", c_int)),
        *(("poll", c_uint32), ("strict_cpu", c_bool), ("paused", c_bool)),
    )


LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
# Name -> result, arguments.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_log_set": (None, [LOG_CALLBACK, c_void_p]),
    "ggml_version": (c_char_p, []),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_new_tensor_1d": (c_void_p, [c_void_p, c_int, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_add": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_set_threadpool": (None, [c_void_p, c_void_p]),
    "ggml_threadpool_params_init": (None, [POINTER(ThreadpoolParams), c_int]),
    "ggml_threadpool_new": (c_void_p, [POINTER(ThreadpoolParams)]),
}


class Library:
    """ggml's functions by name, whichever of its libraries has them."""

    def __init__(self, folder: Path) -> None:
        """Loads the libraries below `folder`."""
        found = [next(iter(sorted(folder.rglob(f"lib{name}.*"))), None) for name in ("ggml-base", "ggml-cpu")]
        if None in found:
            raise UnavailableError(f"no libggml-base and libggml-cpu in the folder that {VARIABLE} names")
        self._parts = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in found]
        self._silent = LOG_CALLBACK(lambda level, text, data: None)  # it reports every weight that it packs
        self.ggml_log_set(self._silent, None)

    def __getattr__(self, name: str) -> Any:
        result, arguments = FUNCTIONS[name]
        function = next(getattr(part, name) for part in self._parts if hasattr(part, name))
        function.restype, function.argtypes = result, arguments
        setattr(self, name, function)
        return function


@lru_cache(maxsize=1)
def library() -> Library:
    """The build that NARROWCAST_GGML names."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise UnavailableError(f"no build of ggml; {VARIABLE} would name its folder")
    try:
        return Library(Path(folder))
    except OSError as error:
        raise UnavailableError(f"the libraries in the folder that {VARIABLE} names do not load") from error


def version() -> str | None:
    """The version of that build; None without one."""
    try:
        return str(library().ggml_version().decode())
    except UnavailableError:
        return None


@lru_cache(maxsize=4)
def backend(threads: int) -> int:
    """A CPU backend with a pool of so many threads; lives as long as the process."""
    ggml = library()
    made = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(made, threads)
    parameters = ThreadpoolParams()
    ggml.ggml_threadpool_params_init(byref(parameters), threads)
    parameters.poll = POLL
    ggml.ggml_backend_cpu_set_threadpool(made, ggml.ggml_threadpool_new(byref(parameters)))
    return int(made)


@lru_cache(maxsize=1)
def repack_buffer() -> int:
    """The buffer type that interleaves rows."""
    ggml = library()
    registry = ggml.ggml_backend_cpu_reg()
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(ggml.ggml_backend_reg_dev_get(registry, 0))
    for kind in listed:
        if kind is None:
            raise UnavailableError("this build of ggml has no CPU_REPACK buffer")
        if ggml.ggml_backend_buft_name(kind) == b"CPU_REPACK":
            return int(kind)
    raise AssertionError("the list of buffer types ends with a null pointer")


class Buffers:
    """Contexts and buffers of ggml, freed with this object."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._contexts: list[int] = []
        self._buffers: list[int] = []

    def context(self) -> int:
        """A new context for descriptions of tensors."""
        made = int(library().ggml_init(InitParams(CONTEXT_BYTES, None, True)))
        self._contexts.append(made)
        return made

    def keep(self, buffer: int) -> None:
        """Frees this buffer too."""
        self._buffers.append(buffer)

    def __del__(self) -> None:
        for buffer in self._buffers:
            library().ggml_backend_buffer_free(buffer)
        for context in self._contexts:
            library().ggml_free(context)


def copies_of(kind: int, *, repacked: bool) -> Callable[[Problem], Callable[[], Prepare]]:
    """The layer in one of ggml's formats."""

    def copies(problem: Problem) -> Callable[[], Prepare]:
        ggml = library()
        rows, columns = problem.weight.shape
        if columns % BLOCK or (repacked and rows % REPACKED_ROWS):
            raise UnavailableError(f"ggml packs blocks of {BLOCK} inputs and {REPACKED_ROWS} rows")
        blocks = torch.empty(rows * columns // BLOCK * BLOCK_BYTES[kind], dtype=torch.uint8)
        ggml.ggml_quantize_chunk(kind, problem.weight.data_ptr(), blocks.data_ptr(), 0, rows, columns, None)

        def copy() -> Prepare:
            owned = Buffers()
            context = owned.context()
            weight = ggml.ggml_new_tensor_2d(context, kind, columns, rows)
            place = repack_buffer() if repacked else ggml.ggml_backend_cpu_buffer_type()
            owned.keep(ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, place))
            ggml.ggml_backend_tensor_set(weight, blocks.data_ptr(), 0, blocks.numel())
            return lambda x: product(owned, weight, problem.bias, x)

        return copy

    return copies


def product(weight_buffers: Buffers, weight: int, bias: Tensor, x: Tensor) -> Call:
    """The call of one graph: input times weight plus bias."""
    ggml, owned, runner = library(), Buffers(), backend(torch.get_num_threads())
    batch, columns = x.shape
    context = owned.context()
    given = ggml.ggml_new_tensor_2d(context, F32, columns, batch)
    added = ggml.ggml_new_tensor_1d(context, F32, len(bias))
    answer = ggml.ggml_add(context, ggml.ggml_mul_mat(context, weight, given), added)
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, answer)
    owned.keep(ggml.ggml_backend_alloc_ctx_tensors(context, runner))
    for tensor, values in ((given, x.contiguous()), (added, bias)):
        ggml.ggml_backend_tensor_set(tensor, values.data_ptr(), 0, 4 * values.numel())
    pointer = ctypes.cast(ggml.ggml_get_data(answer), POINTER(ctypes.c_float * (batch * len(bias))))
    output = torch.frombuffer(pointer.contents, dtype=torch.float32).view(batch, len(bias))
    compute = ggml.ggml_backend_graph_compute

    def call() -> Tensor:
        compute(runner, graph)
        return output

    call.keeps = (weight_buffers, owned)  # type: ignore[attr-defined]  # ggml knows only addresses
    return call


CONTENDERS = (
    Contender("ggml Q4_0 repacked", INT4, "int8", 4.5, copies_of(Q4_0, repacked=True)),
    Contender("ggml Q8_0", INT8, "int8", 8.5, copies_of(Q8_0, repacked=False)),
)
