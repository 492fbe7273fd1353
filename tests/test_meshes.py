"""Rows and classes sharded under plain `jax.jit`, on Auto and on Explicit meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xent_jax

INTEGER = xent_jax.softmax_cross_entropy_with_integer_labels
DENSE = xent_jax.softmax_cross_entropy
ROWS, CLASSES = 8, 16
WEIGHTS = np.linspace(0.5, 2.0, CLASSES, dtype=np.float32)

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"class_weights": WEIGHTS},
    "z_loss": {"z_loss": 0.1},
    "all": {"label_smoothing": 0.1, "class_weights": WEIGHTS, "z_loss": 0.1},
}
LOSSES = {
    **{f"integer-{k}": (INTEGER, "ids", v) for k, v in OPTIONS.items()},
    **{f"dense-{k}": (DENSE, "targets", v) for k, v in OPTIONS.items()},
    "sigmoid": (
        xent_jax.sigmoid_binary_cross_entropy,
        "targets",
        {"pos_weight": WEIGHTS, "label_smoothing": 0.1},
    ),
    "nll": (xent_jax.nll_loss, "ids", {"class_weights": WEIGHTS}),
    "categorical": (xent_jax.categorical_cross_entropy, "targets", {}),
    "binary": (xent_jax.binary_cross_entropy, "targets", {}),
    "linearized": (xent_jax.linearized_softmax_cross_entropy, "targets", {}),
}
# The linearized loss takes no mask; that of an elementwise loss has its input's shape.
MASKED = [
    (name, mask)
    for name in LOSSES
    for mask in (None, "rows", "classes")
    if mask is None
    or not (name == "linearized" or (mask == "rows" and name in ("sigmoid", "binary")))
]
SPECS = {"rows": ("a", None), "classes": (None, "a"), "both": ("a", "b")}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("classes", [2048, 2176, 8192])
def test_many_classes_over_any_number_of_shards(classes, kind, rng):
    """2176 classes are 17 blocks of 128: not as many as there are shards."""
    types = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((4,), ("a",), axis_types=types, devices=jax.devices()[:4])
    logits = rng.standard_normal((3, classes)).astype(np.float32)
    ids = rng.integers(0, classes, 3)
    mean = jax.jit(jax.value_and_grad(lambda x, y: INTEGER(x, y).mean()))
    expected = mean(logits, ids)
    with jax.set_mesh(mesh):
        value, gradient = mean(jax.device_put(logits, jax.P(None, "a")), ids)
    np.testing.assert_allclose(value, expected[0], rtol=2e-6)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("name", "mask"), MASKED)
def test_sharded_is_unsharded(name, mask, spec, kind, rng):
    loss, labels_kind, options = LOSSES[name]
    shape = (8, 1) if spec == "rows" else (1, 8) if spec == "classes" else (2, 4)
    names = ("a", "b") if spec != "classes" else ("b", "a")
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh(shape, names, axis_types=types)
    logits = rng.uniform(0.1, 0.9, (ROWS, CLASSES)).astype(np.float32)
    targets = rng.random((ROWS, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES - 4, ROWS) if labels_kind == "ids" else targets
    where = {
        None: None,
        "rows": np.arange(ROWS) % 3 > 0,
        "classes": np.broadcast_to(np.arange(CLASSES) < 12, (ROWS, CLASSES)),
    }[mask]

    @jax.jit
    def both(logits, labels, where):
        masked = {} if where is None else {"where": where}

        def total(logits):
            return loss(logits, labels, **masked, **options).sum()

        return jax.value_and_grad(total)(logits)

    expected = both(logits, labels, where)
    full, row = jax.P(*SPECS[spec]), jax.P(SPECS[spec][0])
    with jax.set_mesh(mesh):

        def put(array):
            if array is None:
                return None
            return jax.device_put(jnp.asarray(array), full if array.ndim > 1 else row)

        value, gradient = both(put(logits), put(labels), put(where))
        assert gradient.sharding.is_equivalent_to(
            jax.sharding.NamedSharding(mesh, full), 2
        )
    np.testing.assert_allclose(value, expected[0], rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-6)
