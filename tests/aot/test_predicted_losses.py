"""The losses of logits on TPUs: predicted time beside optax's, and over the floor."""

import pytest

from aot import compilers, contracts
from aot.predict import predict_loss

if not compilers.has_tpu_compiler():
    pytest.skip(
        "the TPU compiler is not installed: pip install libtpu",
        allow_module_level=True,
    )

pytestmark = pytest.mark.once


# Arrays that stay on the chip between passes, and a few long rows.
@pytest.mark.parametrize("shape", [(16384, 1000), (65536, 100), (1024, 151936)])
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_class_ids_take_as_long_as_the_plain_formula(chip, shape):
    # optax's program, of bfloat16 sums, gathers the labels' logits, whose waits for the
    # memory are not predicted.
    ours = predict_loss(chip, "class ids", shape).seconds
    assert ours <= 1.08 * predict_loss(chip, "optax", shape).seconds


# At 80 % of the bandwidth, a copy takes 1.25 times the floor.
@pytest.mark.parametrize(
    ("loss", "chip", "most"),
    [
        ("class ids", "v5e", 1.26),
        ("class ids", "v6e", 1.27),
        ("class ids", "tpu7x", 1.60),
        ("sigmoid", "v5e", 1.26),
        ("sigmoid", "v6e", 1.27),
        ("sigmoid", "tpu7x", 2.00),
    ],
)
def test_time_over_the_floor(loss, chip, most):
    assert 1.24 <= predict_loss(chip, loss, contracts.SHAPE).ratio <= most
