"""Several JAX processes on this machine, joined by jax.distributed on the loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import xent_jax

PREAMBLE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[4]))
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    coordinator_address=sys.argv[1],
    num_processes=int(sys.argv[2]),
    process_id=int(sys.argv[3]),
    initialization_timeout=120,
)
"""


def run(
    program: str, *, processes: int = 2, devices: int = 2, timeout: float = 300
) -> list[str]:
    """Runs a program in every process; returns what each printed.

    Args:
      program: Python; JAX is imported and joined to the others when it starts.
      processes: how many.
      devices: CPU devices a process.
      timeout: in seconds, for all of them together. None is left running after it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folders = [str(Path(xent_jax.__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(folders),
    }
    command = [sys.executable, "-c", PREAMBLE + program, address, str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(index), str(devices)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        results = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    for process, (output, errors) in zip(started, results, strict=True):
        if process.returncode != 0:
            raise AssertionError(f"exit status {process.returncode}\n{output}{errors}")
    return [output for output, _ in results]
