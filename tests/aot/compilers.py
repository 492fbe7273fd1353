"""Compiles for TPUs and for an H100 on a machine that has neither.

The TPU compiler is the `libtpu` wheel, the GPU compiler the `jax-cuda13-plugin` wheel
(or `jax-cuda12-plugin`); neither needs a device or a driver. What comes back is the
program as scheduled for the chip and the memory it needs, which is what the tests
assert. Nothing can be run, and nothing is timed.
"""

import atexit
import concurrent.futures
import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export
from jax.experimental import topologies

from aot import hlo

# The smallest topology of each generation that a TPU user is likely to have: one chip.
TPU_TOPOLOGIES = {
    "v5e": "v5e:1x1",
    "v6e": "v6e:1x1",
    "v5p": "v5p:1x1x1",
    "tpu7x": "tpu7x:1x1x1",
}

# libtpu reads these when it is loaded, that is at the first topology.
_LIBTPU_ENVIRONMENT = {
    # The two that are missing on a machine without a TPU, each a page of warnings.
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # No question to a cloud metadata server, no log files, and no lock file, which
    # would let only one process on the machine compile.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_H100 = pathlib.Path(__file__).with_name("h100.txtpb")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for a chip.

    Attributes:
      text: the optimised, scheduled HLO.
      temp_bytes: main memory needed beyond arguments and results.
    """

    text: str
    temp_bytes: int

    @functools.cached_property
    def module(self) -> hlo.Module:
        """The program, parsed."""
        return hlo.parse(self.text)


def has_tpu_compiler() -> bool:
    """Whether `libtpu` is installed."""
    return importlib.util.find_spec("libtpu") is not None


def has_gpu_compiler() -> bool:
    """Whether one of JAX's CUDA plugins is installed, and what reaching it takes."""
    plugins = [
        importlib.util.find_spec(name)
        for name in ("jax_cuda13_plugin", "jax_cuda12_plugin")
    ]
    # JAX serialises exported programs with it, and does not depend on it.
    return any(plugins) and importlib.util.find_spec("flatbuffers") is not None


def compile_for_tpu(
    chip: str, function: Callable, *arguments: jax.ShapeDtypeStruct
) -> Compiled:
    """Compiles a function for one TPU chip.

    Args:
      chip: a key of `TPU_TOPOLOGIES`, or another whose topologies have three axes.
      function: what to compile.
      *arguments: shapes and dtypes of its arguments, pytrees included.
    """
    return _compile(_tpu_device(chip), function, arguments)


def tpu_mesh(
    shape: tuple[int, ...], names: tuple[str, ...], kind: str = "Auto"
) -> jax.sharding.Mesh:
    """A mesh of the eight chips of a v5e host, of axes of one type."""
    types = (getattr(jax.sharding.AxisType, kind),) * len(names)
    devices = np.array(_tpu_host()).reshape(shape)
    return jax.sharding.Mesh(devices, names, axis_types=types)


def compile_for_mesh(
    mesh: jax.sharding.Mesh, function: Callable, arguments: Any, specs: Any
) -> Compiled:
    """Compiles a function for all devices of a mesh.

    Args:
      mesh: of devices of a topology.
      function: what to compile.
      arguments: a tuple of shapes and dtypes, pytrees included.
      specs: how each of them is sharded.
    """
    placed = jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec)
        ),
        arguments,
        specs,
    )
    return _shown(jax.jit(function).lower(*placed).compile(), "a mesh")


def compile_for_gpu(function: Callable, *arguments: jax.ShapeDtypeStruct) -> Compiled:
    """Compiles a function for an H100, in another process.

    LLVM answers an instruction it cannot select by aborting the process, which must not
    be that of the test run: a crash raises `BrokenProcessPool` here. The function
    crosses over as an exported program, since functions in general do not pickle.

    Args:
      function: what to compile.
      *arguments: shapes and dtypes of its arguments, pytrees included.
    """
    exported = export.export(jax.jit(function), platforms=["cuda"])(*arguments)
    try:
        work = _gpu_pool().submit(_compile_exported, exported.serialize())
        return work.result()
    except concurrent.futures.BrokenExecutor:
        _gpu_pool.cache_clear()
        raise


@functools.cache
def _tpu_device(chip: str) -> jax.Device:
    """A device that can be compiled for and nothing else."""
    # Up to libtpu 0.0.48 a host has 2x2x1 chips by default, and a topology smaller
    # than a host is refused.
    return _tpu_devices(
        TPU_TOPOLOGIES.get(chip, f"{chip}:1x1x1"),
        chips_per_host_bounds=(1, 1, 1),
        num_slices=1,
    )[0]


@functools.cache
def _tpu_host() -> list[jax.Device]:
    """Eight such devices, joined."""
    return _tpu_devices("v5e:2x4")


def _tpu_devices(topology: str, **options: Any) -> list[jax.Device]:
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **options
    ).devices


@functools.cache
def _gpu_pool() -> concurrent.futures.ProcessPoolExecutor:
    """One process, started afresh: JAX must not be forked."""
    pool = concurrent.futures.ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_gpu_process,
    )
    # The cache would keep it into the interpreter's own end, which it does not survive.
    atexit.register(pool.shutdown)
    return pool


def _start_gpu_process() -> None:
    """Keeps JAX off the machine's own accelerators: the plugin is a compiler here."""
    jax.config.update("jax_platforms", "cpu")
    # The plugin would otherwise look for the CUDA libraries, which compiling never
    # calls.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"


def _compile_exported(program: bytearray) -> Compiled:
    """Runs in the GPU process."""
    exported = export.deserialize(program)
    device = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology="1x1x1",
        target_config=_H100.read_text(),
    ).devices[0]
    arguments, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    return _compile(device, exported.call, arguments)


def _compile(device: jax.Device, function: Callable, arguments: tuple) -> Compiled:
    """Compiles for a device of a topology, which the arguments' shardings name."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    # As where the program will run: a lowering asks the default device for the chip.
    with jax.default_device(device):
        lowered = jax.jit(function).lower(*placed)
    return _shown(lowered.compile(), device.device_kind)


def _shown(compiled: jax.stages.Compiled, target: str) -> Compiled:
    """Reads what the compiler tells of a program."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise RuntimeError(f"the compiler for {target} shows no program.")
    return Compiled(text, memory.temp_size_in_bytes)
