"""Several processes, joined by jax.distributed, give what one gives."""

import json

import numpy as np
import pytest
from distributed import COMPUTATIONS
from grids import shortened
from processes import run


@pytest.mark.parametrize(("processes", "devices"), shortened([(2, 2), (4, 2)], kept=[]))
def test_processes_give_what_one_gives(processes, devices):
    program = "import distributed; distributed.main()"
    outputs = run(program, processes=processes, devices=devices)
    assert len(outputs) == processes
    alone = {name: one.run() for name, one in COMPUTATIONS.items()}
    for output in outputs:
        results = json.loads(output.splitlines()[-1])
        assert results.keys() == alone.keys()
        for name, truth in alone.items():
            for ours, theirs in zip(results[name], truth, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
