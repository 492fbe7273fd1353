"""Rows sharded over processes give what one process gives."""

import json

import numpy as np
import pytest
from processes import run

from xent_jax import sinkhorn_targets

SCORES = """
import numpy as np
scores = np.random.default_rng(3).standard_normal((32, 8)).astype(np.float32) / 3
"""

PROGRAM = (
    SCORES
    + """
import functools, json
from xent_jax import sinkhorn_targets
mesh = jax.make_mesh((jax.device_count(),), ("data",))
spec = jax.P("data")
sharding = jax.NamedSharding(mesh, spec)
rows = np.split(np.arange(32), jax.process_count())[jax.process_index()]
array = jax.make_array_from_process_local_data(sharding, scores[rows])
results = {}
for tol in (None, 0.1):
    targets = functools.partial(
        sinkhorn_targets, tol=tol, num_iters=6, batch_axis_name="data"
    )
    sharded = jax.jit(
        jax.shard_map(targets, mesh=mesh, in_specs=spec, out_specs=spec)
    )(array)
    shards = sorted(sharded.addressable_shards, key=lambda s: s.index[0].start)
    local = np.concatenate([np.asarray(s.data) for s in shards])
    results[str(tol)] = local.tolist()
print(json.dumps([rows.tolist(), results]))
"""
)


@pytest.mark.parametrize("processes", [2])
def test_sinkhorn_targets(processes):
    names = {}
    exec(SCORES, names)
    outputs = [json.loads(text.splitlines()[-1]) for text in run(PROGRAM)]
    assert len(outputs) == processes
    for tol in (None, 0.1):
        truth = np.asarray(sinkhorn_targets(names["scores"], tol=tol, num_iters=6))
        for rows, results in outputs:
            np.testing.assert_allclose(results[str(tol)], truth[rows], atol=1e-6)
