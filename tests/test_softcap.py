"""The softcap: values and derivatives for every size of the softcap and the logits."""

import functools

import jax
import numpy as np
import oracle
import pytest
from heads import LOSS

from xent_jax._reductions.softcap import softcapped


def cap_derivatives(z, cap):
    """Derivatives of cap·tanh(z / cap) up to the third, by orders of z and cap.

    By Euler's theorem, as the function is homogeneous.
    """
    z, cap = np.float64(z), np.float64(cap)
    r = z / cap
    tanh, slope = np.tanh(r), 1 / np.cosh(np.clip(r, -300, 300)) ** 2
    bend = -2 * tanh * slope  # of the slope, by r
    third = -2 * slope * (slope - 2 * tanh**2)
    by_cap = tanh - r * slope if abs(r) > 1e-3 else 2 * r**3 / 3 - 8 * r**5 / 15
    return {
        (0, 0): cap * tanh, (1, 0): slope, (0, 1): by_cap,
        (2, 0): bend / cap, (1, 1): -r * bend / cap, (0, 2): r * r * bend / cap,
        (3, 0): third / cap**2, (2, 1): -(bend + r * third) / cap**2,
        (1, 2): (2 * r * bend + r * r * third) / cap**2,
        (0, 3): -(3 * r * r * bend + r**3 * third) / cap**2,
    }  # fmt: skip


@pytest.mark.parametrize("cap", [1e-31, 1e-30, 1e-3, 1.5, 30.0, 1e4, 1e15, 1e38])
def test_softcap_and_its_derivatives_for_every_size(cap):
    """Against the closed forms in float64, by forward and reverse mode in turn."""
    cap = np.float32(cap)

    def derivative(of_z, of_cap):
        def result(z, cap):
            return softcapped(z, cap)

        for order, place in enumerate((0,) * of_z + (1,) * of_cap):
            result = (jax.grad, jax.jacfwd)[order % 2](result, place)
        return jax.jit(result)

    sizes = (0.0, 1e-6, 1e-3, 0.1, 0.5, 1.0, 3.0, 100.0)
    tiny, most = 2.0**-126, 1e36
    points = [size * float(cap) for size in sizes] + [0.3, -7.0, 1e30]
    points = [np.float32(z) for z in points if z == 0 or tiny < abs(z) < 3e38]
    for orders in cap_derivatives(1.0, 1.0):
        slope = derivative(*orders)
        unit = float(cap) ** (1 - sum(orders))
        for z in points if unit < most else ():
            truth = cap_derivatives(z, cap)[orders]
            error = abs(np.float64(slope(z, cap)) - truth)
            ratio = abs(float(z)) / float(cap)
            # 1 − tanh² loses digits where tanh is near 1.
            lost = 0 if ratio < 1 else 1e-6 * unit * (1 + min(ratio, 10)) ** 3
            assert error <= 2e-5 * abs(truth) + lost + tiny, (orders, z, truth)


@pytest.mark.parametrize("reduction", [None, "sum"])
@pytest.mark.parametrize("cap", [1e-30, 0.5, 1e10, 1e38, 3e38, np.float64(2e38)])
def test_heads_with_softcaps_of_every_size(cap, reduction, rng):
    hidden = rng.standard_normal((4, 3)).astype(np.float32)
    kernel = rng.standard_normal((3, 5)).astype(np.float32)
    ids = np.array([0, 4, 2, 1])
    truth = oracle.linear_softmax_cross_entropy(
        hidden, kernel, ids, softcap=cap, reduction=reduction
    )
    run = functools.partial(LOSS, softcap=cap, reduction=reduction)
    np.testing.assert_allclose(run(hidden, kernel, ids), truth.value, rtol=2e-6)
    gradient = jax.grad(lambda h: run(h, kernel, ids).sum())(hidden)
    np.testing.assert_allclose(gradient, truth.hidden, rtol=1e-5, atol=1e-6)
