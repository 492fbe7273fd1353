"""Where an accurate cross-entropy changes a result, and where it does not.

    pip install '.[examples]'
    python examples/where_it_matters.py

Each part does the same thing twice, with optax's loss and with this package's, and
compares both with float64 on the host. The data come with scikit-learn. It takes less
than a minute on two CPU cores.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import xent_jax

NAMES = {
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "xent_jax": xent_jax.softmax_cross_entropy_with_integer_labels,
}
SEED = 0


def digits():
    """Returns images and labels, to train on and held out."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, random_state=SEED, stratify=labels)
    x, x_held_out, y, y_held_out = parts
    return jnp.float32(x), jnp.int32(y), jnp.float32(x_held_out), jnp.int32(y_held_out)


def network(parameters, images):
    """Returns the logits of a network with one hidden layer."""
    first, second = parameters
    return jax.nn.relu(images @ first) @ second


def begin():
    """Returns the parameters that training starts from."""
    keys = jax.random.split(jax.random.key(SEED))
    shapes = ((64, 128), (128, 10))
    return [
        jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, shape in zip(keys, shapes, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train(name, dtype, steps, images, labels):
    """Returns the parameters after full-batch steps of Adam."""
    adam = optax.adam(1e-2)

    def mean_loss(parameters):
        logits = network(parameters, images).astype(dtype)
        return NAMES[name](logits, labels).astype(jnp.float32).mean()

    def step(carry, _):
        parameters, state = carry
        updates, state = adam.update(jax.grad(mean_loss)(parameters), state)
        return (optax.apply_updates(parameters, updates), state), None

    parameters = begin()
    carry, _ = jax.lax.scan(step, (parameters, adam.init(parameters)), length=steps)
    return carry[0]


def true_margins(logits, labels):
    """Returns how far each label is ahead of its best rival, in float64."""
    logits = np.asarray(logits).astype(np.float64)
    hit = np.arange(logits.shape[1]) == np.asarray(labels)[:, None]
    return logits[hit] - np.where(hit, -np.inf, logits).max(1)


def true_loss(logits, labels):
    """Returns the losses and their gradients in float64, with nothing subtracted."""
    logits = np.asarray(logits).astype(np.float64)
    hit = np.arange(logits.shape[1]) == np.asarray(labels)[:, None]
    odds = np.where(hit, 0, np.exp(logits - logits[hit][:, None]))
    rest = odds.sum(1, keepdims=True)
    gradient = np.where(hit, -rest, odds) / (1 + rest)
    return np.log1p(rest[:, 0]), gradient


def where_it_does_not(data):
    """A classifier of digits in float32, trained as people do."""
    print("accuracy of a digits classifier, float32, 200 steps")
    for name in NAMES:
        parameters = train(name, "float32", 200, *data[:2])
        right = network(parameters, data[2]).argmax(1) == data[3]
        print(f"  {name:9} held-out accuracy {right.mean():.4f}")


def half_precision(data):
    """The same with bfloat16 logits: rows that are learned no longer count."""
    print("bfloat16 logits, after 200 steps in float32: what the next step sees")
    images, labels = data[:2]
    logits = network(train("xent_jax", "float32", 200, images, labels), images)
    logits = logits.astype(jnp.bfloat16)
    value, slope = true_loss(logits, labels)
    for name, loss in NAMES.items():
        losses, pull = jax.vjp(lambda x, loss=loss: loss(x, labels), logits)
        (gradient,) = pull(jnp.ones_like(losses))
        mean = float(losses.astype(jnp.float32).mean())
        gradient = np.float64(gradient)
        missed = np.linalg.norm(gradient - slope) / np.linalg.norm(slope)
        zero = (np.take_along_axis(gradient, np.c_[labels], 1) == 0).mean()
        print(
            f"  {name:9} mean loss off by {abs(mean / value.mean() - 1):.1%}, "
            f"label's gradient is 0 in {zero:.0%} of rows, "
            f"whole gradient off by {missed:.1%}"
        )


def small_losses(data):
    """Descent along the normalized gradient, until float32 has nothing to say."""
    print("three classes of digits, a linear model, 3000 normalized steps in float32")
    keep = np.asarray(data[1]) < 3
    images, labels = data[0][keep], data[1][keep]

    @functools.partial(jax.jit, static_argnums=0)
    def descend(name):
        def mean_loss(kernel):
            return NAMES[name](images @ kernel, labels).mean()

        def step(kernel, _):
            gradient = jax.grad(mean_loss)(kernel)
            norm = jnp.linalg.norm(gradient)
            return kernel - 0.2 * gradient / jnp.where(norm == 0, 1, norm), None

        return jax.lax.scan(step, jnp.zeros((64, 3)), length=3000)[0]

    for name in NAMES:
        kernel = np.float64(descend(name))
        logits = np.float64(images) @ kernel
        margin = true_margins(logits, labels).min() / np.linalg.norm(kernel)
        loss = true_loss(logits, labels)[0].mean()
        print(f"  {name:9} loss {loss:.1e}, smallest normalized margin {margin:.4f}")


def gradient_penalty(data):
    """The squared norm of the loss's gradient by the image, of rows learned well."""
    print("gradient penalty, |d loss / d image|^2, float32, after 2000 steps")
    images, labels = data[:2]
    parameters = train("xent_jax", "float32", 2000, images, labels)
    first, second = (np.float64(part) for part in parameters)
    hidden = np.float64(images) @ first
    slope = true_loss(np.maximum(hidden, 0) @ second, labels)[1]
    truth = np.square(((slope @ second.T) * (hidden > 0)) @ first.T).sum(1)

    for name, loss in NAMES.items():

        def of_image(image, label, loss=loss):
            return loss(network(parameters, image[None]), label[None])[0]

        gradients = jax.jit(jax.vmap(jax.grad(of_image)))(images, labels)
        penalty = np.square(np.float64(gradients)).sum(1)
        off = np.median(np.abs(penalty / truth - 1))
        print(f"  {name:9} median relative error {off:.1e}")


def large_vocabulary():
    """An untrained language model's loss, from bfloat16 logits."""
    print("bfloat16 logits of 128256 classes, 64 rows")
    rng = np.random.default_rng(SEED)
    logits = jnp.asarray(rng.standard_normal((64, 128256)), jnp.bfloat16)
    labels = jnp.asarray(rng.integers(0, 128256, 64))
    truth = true_loss(logits, labels)[0]
    for name, loss in NAMES.items():
        losses = np.float64(loss(logits, labels))
        print(
            f"  {name:9} largest error of a loss {np.abs(losses - truth).max():.1e}, "
            f"perplexity off by {abs(np.exp((losses - truth).mean()) - 1):.1e}"
        )


def main():
    """Prints every part."""
    data = digits()
    where_it_does_not(data)
    half_precision(data)
    small_losses(data)
    gradient_penalty(data)
    large_vocabulary()


if __name__ == "__main__":
    main()
