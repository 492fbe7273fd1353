# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Handwritten digits: one data set, two cross-entropies
#
# 1797 images of 8 by 8 pixels, ten classes, a small network. We train it twice: on *one
# question with ten answers* (softmax cross-entropy) and on *ten yes-or-no questions*
# (sigmoid binary cross-entropy). On the way: what the loss is, what its gradient is,
# and how to mask a batch that is not full.
#
# The data come with scikit-learn; nothing is downloaded. The whole run takes well under
# a minute on two CPU cores, and the same code runs on a GPU or a TPU.

# %% [markdown] tags=["setup"]
# *Set-up.* In a checkout, `pip install '.[examples]'` brings all that is needed.
# On [Colab](https://colab.research.google.com), upload the wheel that
# `pip wheel --no-deps .` makes in a checkout; this cell installs it and nothing else.

# %% cellView="form" jupyter={"source_hidden": true} tags=["setup", "hide-input"]
# @title Set-up { display-mode: "form" }
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax

IN_COLAB = "google.colab" in sys.modules
if IN_COLAB and importlib.util.find_spec("xent_jax") is None:
    wheels = sorted(Path().glob("xent_jax-*.whl"), key=lambda p: p.stat().st_mtime)
    if not wheels:
        raise FileNotFoundError(
            "upload xent_jax-<version>-py3-none-any.whl in the file panel on the left "
            "(`pip wheel --no-deps .` in a checkout makes it), then run this cell again"
        )
    source = str(wheels[-1])
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, source], check=True)
    importlib.invalidate_caches()

print("devices:", jax.devices())
# Are the losses right on this device? Asked on Colab; elsewhere set the variable, or
# run `python -m xent_jax.verify`.
if IN_COLAB or os.environ.get("XENT_JAX_EXAMPLE_VERIFY"):
    from xent_jax import verify

    # The same as the command, but in this process: a TPU serves one at a time.
    if verify.main(["--platform", jax.default_backend()]) != 0:
        raise RuntimeError("verify: on this device a loss is out of its bounds")

# %%
import os

import flax.linen
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import xent_jax

# %% [markdown]
# Two environment variables change a run: `XENT_JAX_EXAMPLE_EPOCHS` shortens it (the
# check at the end then only prints), and `XENT_JAX_EXAMPLE_FIGURE` names the file that
# the figure is saved to.

# %%
FULL_EPOCHS = 40
EPOCHS = int(os.environ.get("XENT_JAX_EXAMPLE_EPOCHS", FULL_EPOCHS))
FIGURE = os.environ.get("XENT_JAX_EXAMPLE_FIGURE", "digits.png")
SEED = 0
BATCH = 128
CLASSES = 10

pixels, digits = load_digits(return_X_y=True)
train_images, test_images, train_labels, test_labels = train_test_split(
    (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1),
    digits.astype(np.int32),
    test_size=0.25,
    stratify=digits,
    random_state=SEED,
)
print(f"{len(train_labels)} images to train on, {len(test_labels)} held out")

# %% [markdown]
# ## Batches of one shape
#
# 1347 images do not divide into batches of 128: the last batch has 67. A batch of
# another shape would be another compilation, so we pad it, and say in a boolean array
# `keep` which rows are real. The padding gets the label -1, which names no class:
# whatever stands there must not matter.


# %%
def batches(order):
    """Yields (images, labels, keep) in the given order, always BATCH rows of each."""
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        padding = BATCH - len(rows)
        yield (
            np.pad(train_images[rows], ((0, padding), (0, 0), (0, 0), (0, 0))),
            np.pad(train_labels[rows], (0, padding), constant_values=-1),
            np.arange(BATCH) < len(rows),
        )


# One padded batch to look at: the first 67 training images, sorted by their label.
images, labels, keep = next(batches(np.argsort(train_labels[:67], kind="stable")))

# %% [markdown]
# ## The loss
#
# For one image the network gives ten numbers, its *logits* $x$. Softmax makes
# probabilities of them, and the cross-entropy is minus the log-probability of the right
# class $y$:
#
# $$\ell(x, y) = -\log \frac{e^{x_y}}{\sum_v e^{x_v}} = \log \sum_v e^{x_v} - x_y$$
#
# A blind guess among ten classes costs $\log 10 \approx 2.30$; an untrained network
# does about as well as that.
#
# The library returns one loss per image, and `where=keep` drops the padding: a dropped
# row has loss 0 and gradient 0. What remains is the mean. `losses.mean()` divides by
# 128 although only 67 images were counted; `weighted_mean(losses, keep)` divides by the
# sum of the weights, 67, and so gives the mean over the real rows.


# %%
class Network(nnx.Module):
    """A 3 by 3 convolution, a maximum over 2 by 2 pixels, ten logits."""

    def __init__(self, rngs):
        self.filters = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.output = nnx.Linear(4 * 4 * 32, CLASSES, rngs=rngs)

    def __call__(self, images):
        hidden = nnx.relu(self.filters(images))
        hidden = nnx.max_pool(hidden, (2, 2), (2, 2))
        return self.output(hidden.reshape(len(images), -1))


def softmax_losses(logits, labels, keep):
    return xent_jax.softmax_cross_entropy_with_integer_labels(
        logits, labels, where=keep
    )


untrained = Network(nnx.Rngs(SEED))
logits = untrained(images)
losses = softmax_losses(logits, labels, keep)
print(f"the 67 real rows, averaged   {losses[:67].mean():.4f}")
print(f"weighted_mean(losses, keep)  {xent_jax.weighted_mean(losses, keep):.4f}")
print(f"losses.mean()                {losses.mean():.4f}  (too small: 67/128 of it)")

# %% [markdown]
# ## Its gradient
#
# Differentiating $\log \sum_v e^{x_v}$ gives softmax, and differentiating $x_y$ gives a
# one at the right class, so
#
# $$\frac{\partial \ell}{\partial x} = \mathrm{softmax}(x) - \mathrm{onehot}(y):$$
#
# what the network believes minus what is true. Each entry lies between -1 and 1, a
# row sums to zero, and it vanishes when the belief is right. `jax.grad` must agree,
# padding included.


# %%
def logit_gradient(model):
    """The gradient of each image's loss by its logits, for the batch above."""
    return jax.grad(lambda logits: softmax_losses(logits, labels, keep).sum())(
        model(images)
    )


closed_form = jax.nn.softmax(logits) - jax.nn.one_hot(labels, CLASSES)
difference = logit_gradient(untrained) - jnp.where(keep[:, None], closed_form, 0)
print(f"jax.grad against softmax(x) - onehot(y): {jnp.abs(difference).max():.1e} apart")

# %% [markdown]
# ## Training
#
# A training step is the usual one. The average over an epoch is weighted too, by the
# images in each batch: the mean of the batches' means would count each image of the
# last batch almost twice.


# %%
def train(loss_function, description):
    """Trains a fresh network; returns it and the mean loss of every epoch."""
    model = Network(nnx.Rngs(SEED))
    optimizer = nnx.Optimizer(model, optax.adam(5e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels, keep):
        loss, gradients = nnx.value_and_grad(loss_function)(model, images, labels, keep)
        optimizer.update(model, gradients)
        return loss

    shuffle = np.random.default_rng(SEED)
    curve = []
    progress = tqdm(range(EPOCHS), desc=description)
    for _ in progress:
        losses, counts = [], []
        for batch in batches(shuffle.permutation(len(train_labels))):
            losses.append(step(model, optimizer, *batch))
            counts.append(batch[-1].sum())
        curve.append(np.average(jax.device_get(losses), weights=counts))
        progress.set_postfix(loss=f"{curve[-1]:.4f}")
    return model, curve


def softmax_objective(model, images, labels, keep):
    return xent_jax.weighted_mean(softmax_losses(model(images), labels, keep), keep)


softmax_model, softmax_curve = train(softmax_objective, "softmax")
softmax_accuracy = np.mean(softmax_model(test_images).argmax(-1) == test_labels)
print(f"held-out accuracy, softmax: {softmax_accuracy:.4f}")

# %% [markdown]
# ## Ten yes-or-no questions
#
# The same labels can be read as ten binary ones: "is it a 0?", "is it a 1?", and so on.
# Each logit then answers for itself through the sigmoid $\sigma$, and the loss is per
# image *and* per question:
#
# $$\ell(x, y) = -y \log \sigma(x) - (1 - y) \log (1 - \sigma(x)), \qquad
# \frac{\partial \ell}{\partial x} = \sigma(x) - y.$$
#
# The same law again: belief minus truth. This is the loss for labels that do not
# exclude each other. We add up an image's ten questions, so an untrained network starts
# near $10 \log 2 \approx 6.93$. Here the mask has to name every question, and
# `where=` never broadcasts behind your back, so we spell the shape out.


# %%
def sigmoid_objective(model, images, labels, keep):
    logits = model(images)
    losses = xent_jax.sigmoid_binary_cross_entropy(
        logits,
        jax.nn.one_hot(labels, CLASSES),
        where=jnp.broadcast_to(keep[:, None], logits.shape),
    )
    return xent_jax.weighted_mean(losses.sum(axis=-1), keep)


sigmoid_model, sigmoid_curve = train(sigmoid_objective, "sigmoid")
sigmoid_logits = sigmoid_model(test_images)
answers = np.mean((sigmoid_logits > 0) == jax.nn.one_hot(test_labels, CLASSES))
sigmoid_accuracy = np.mean(sigmoid_logits.argmax(-1) == test_labels)
print(f"held-out yes-or-no answers right, sigmoid: {answers:.4f}")
print(f"held-out accuracy, sigmoid: {sigmoid_accuracy:.4f}")

# %% [markdown]
# ## What was learned
#
# Left, the two curves; they count different questions, so only their shapes compare.
# Right, the gradient of the padded batch from before, an image per column. The
# untrained network believes about 1/10 everywhere: a faint red, and a blue -0.9 at the
# right class, which is a staircase because the columns are sorted by label. Training
# drives it to zero. The padding, from column 67 on, is zero from the start.

# %%
figure, axes = plt.subplot_mosaic(
    [["curves", "untrained"], ["curves", "trained"]],
    figsize=(10, 4),
    width_ratios=[2, 3],
    layout="constrained",
)
epochs = range(1, EPOCHS + 1)
axes["curves"].semilogy(epochs, softmax_curve, label="softmax, one question")
axes["curves"].semilogy(epochs, sigmoid_curve, label="sigmoid, ten questions")
axes["curves"].set(xlabel="epoch", ylabel="training loss per image (nats)")
axes["curves"].legend()
for name, model in {"untrained": untrained, "trained": softmax_model}.items():
    picture = axes[name].imshow(
        logit_gradient(model).T, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto"
    )
    axes[name].set(title=f"softmax(x) - onehot(y), {name}", ylabel="class")
    axes[name].set_yticks(range(0, CLASSES, 3))
axes["trained"].set_xlabel("image")
figure.colorbar(picture, ax=[axes["untrained"], axes["trained"]])
figure.savefig(FIGURE, dpi=120)
print(f"saved the picture {FIGURE}")

# %% [markdown]
# ## The same with Linen
#
# The loss takes arrays and returns arrays, so it does not know which library made the
# logits. With a Linen module and Optax alone, a step reads:


# %%
class LinenNetwork(flax.linen.Module):
    """The same network, as a Linen module."""

    @flax.linen.compact
    def __call__(self, images):
        hidden = flax.linen.relu(flax.linen.Conv(32, (3, 3))(images))
        hidden = flax.linen.max_pool(hidden, (2, 2), (2, 2))
        return flax.linen.Dense(CLASSES)(hidden.reshape(len(images), -1))


linen_network = LinenNetwork()
linen_optimizer = optax.adam(5e-3)


@jax.jit
def linen_step(parameters, state, images, labels, keep):
    def objective(parameters):
        logits = linen_network.apply(parameters, images)
        return xent_jax.weighted_mean(softmax_losses(logits, labels, keep), keep)

    loss, gradients = jax.value_and_grad(objective)(parameters)
    updates, state = linen_optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state, loss


parameters = linen_network.init(jax.random.key(SEED), images)
state = linen_optimizer.init(parameters)
linen_losses = []
for batch in batches(np.random.default_rng(SEED).permutation(len(train_labels))):
    parameters, state, loss = linen_step(parameters, state, *batch)
    linen_losses.append(float(loss))
print(f"one epoch with Linen: {linen_losses[0]:.3f} to {linen_losses[-1]:.3f}")

# %% [markdown]
# ## Check
#
# This network gets about 98.5 % of the held-out digits right. Less than 97 % after a
# full run means that something is broken.

# %%
if softmax_accuracy >= 0.97:
    print("check passed: held-out accuracy is at least 97 %")
elif EPOCHS < FULL_EPOCHS:
    print(f"check skipped: {EPOCHS} of {FULL_EPOCHS} epochs")
else:
    raise RuntimeError(f"held-out accuracy {softmax_accuracy:.4f} is below 0.97")
