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
# # Learning without labels: balanced targets from Sinkhorn's iteration
#
# A network can make its own targets. It compares every image with K *prototypes*, and
# what one view of an image resembles becomes the target for another view of it. Left
# alone this collapses: everything resembles one prototype, and the loss is zero. So the
# targets are *balanced*: over a batch, every prototype gets its share. That is the idea
# of SwAV and of the assignments in DINO; the balancing is Sinkhorn's iteration.
#
# First what the iteration does, then a surrogate loss that some codes train on, what is
# true of it and what is not, and last a small self-supervised run on handwritten
# digits. The data come with scikit-learn; nothing is downloaded, and the whole takes
# less than a minute on two CPU cores.

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
import functools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import xent_jax

# %% [markdown]
# Two environment variables change a run: `XENT_JAX_EXAMPLE_EPOCHS` shortens it (it then
# measures less often too, and the check at the end only prints), and
# `XENT_JAX_EXAMPLE_FIGURE` names a file to save the figure to.

# %%
FULL_EPOCHS = 300
EPOCHS = int(os.environ.get("XENT_JAX_EXAMPLE_EPOCHS", FULL_EPOCHS))
FIGURE = os.environ.get("XENT_JAX_EXAMPLE_FIGURE")
SEED = 0
generator = np.random.default_rng(SEED)

# %% [markdown]
# ## Balancing
#
# Scores $S$ say how similar N samples are to K prototypes. The iteration starts from
# $Q = e^{S/\varepsilon}$ and normalizes in turn: columns to $N/K$, so that every
# prototype gets its share, then rows to one, so that every sample is assigned once.
#
# 96 samples and 12 prototypes, where three prototypes are everyone's favourites:

# %%
SAMPLES, PROTOTYPES = 96, 12
favour = np.where(np.arange(PROTOTYPES) % 4 == 1, 0.4, 0.0)
scores = jnp.asarray(
    0.25 * generator.standard_normal((SAMPLES, PROTOTYPES)) + favour, jnp.float32
)
before = jax.nn.softmax(scores / 0.05)
after = xent_jax.sinkhorn_targets(scores, epsilon=0.05, num_iters=10)
print("column sums, softmax: ", np.round(np.asarray(before.sum(axis=0)), 1))
print("column sums, balanced:", np.round(np.asarray(after.sum(axis=0)), 1))

# %% [markdown]
# How many iterations does it take? The largest relative error of a column sum, by
# iteration: it falls by a constant factor, and a hard assignment (small $\varepsilon$)
# takes long. `tol=` stops once the error is small enough.

# %%
COUNTS = (1, 2, 3, 5, 8, 13, 21, 34)
EPSILONS = (0.5, 0.1, 0.05, 0.02)


def column_error(epsilon, num_iters):
    """The largest |column sum / (N/K) - 1| after so many iterations."""
    targets = xent_jax.sinkhorn_targets(scores, epsilon=epsilon, num_iters=num_iters)
    return float(jnp.abs(targets.sum(axis=0) * PROTOTYPES / SAMPLES - 1).max())


errors = {
    epsilon: [column_error(epsilon, count) for count in COUNTS]
    for epsilon in tqdm(EPSILONS, desc="column errors")
}
for epsilon, error in errors.items():
    print(
        f"epsilon {epsilon:<5} error after 3: {error[2]:.1e}, after 34: {error[-1]:.1e}"
    )

# %% [markdown]
# Written as above, $e^{S/\varepsilon}$ overflows as soon as scores reach
# $88\,\varepsilon$ in float32. Subtracting each row's maximum first is a common cure,
# but columns are normalized first, so that changes the answer. The library iterates on
# logarithms instead:

# %%
wide = jnp.asarray(generator.standard_normal((512, 128)), jnp.float32)


def as_written(scores, epsilon=0.05, num_iters=3):
    targets = jnp.exp(scores / epsilon)
    samples, prototypes = targets.shape
    for _ in range(num_iters):
        targets = targets / targets.sum(axis=0) * (samples / prototypes)
        targets = targets / targets.sum(axis=1, keepdims=True)
    return targets


assigned = xent_jax.sinkhorn_targets(wide).argmax(axis=1)
shifted = as_written(wide - wide.max(axis=1, keepdims=True))
moved = np.mean(np.asarray(shifted.argmax(axis=1) != assigned))
print("as written, N(0, 1) scores:  NaN" if jnp.isnan(as_written(wide)).any() else "ok")
print(f"row maxima subtracted first: {moved:.0%} of the samples assigned elsewhere")

# %% [markdown]
# ## A surrogate with the same gradient
#
# With targets $Q$ and $P = \mathrm{softmax}(a)$, the cross-entropy and a bilinear
# stand-in are
#
# $$L_1 = -\sum_i Q_i \log P_i, \qquad L_2 = \sum_i (P_i - Q_i)\, a_i .$$
#
# The experiment that made $L_2$ popular: draw logits and costs at random, balance the
# targets, and plot one loss over the other. 20 trials with n = 128 and m = 64, sorted
# by $L_1$:


# %%
def trial():
    """Logits, and targets made of costs, as in the original experiment."""
    logits = generator.random((128, 64)) ** 4
    logits = logits / logits.sum(axis=1, keepdims=True)
    costs = generator.random((128, 64)) ** 1.5
    targets = xent_jax.sinkhorn_targets(
        jnp.asarray(-costs, jnp.float32), epsilon=0.5, num_iters=10
    )
    return jnp.asarray(logits, jnp.float32), targets


def loss_1(logits, targets):
    return xent_jax.softmax_cross_entropy(logits, targets).mean()


def loss_2(logits, targets):
    return ((jax.nn.softmax(logits) - targets) * logits).sum(axis=-1).mean()


def entropy(logits):
    """H(softmax(logits)): a softmax as its own target."""
    return xent_jax.softmax_cross_entropy(logits, jax.nn.softmax(logits)).mean()


trials = sorted((trial() for _ in range(20)), key=lambda pair: float(loss_1(*pair)))
first = np.array([loss_1(*pair) for pair in trials])
second = np.array([loss_2(*pair) for pair in trials])
entropies = np.array([entropy(logits) for logits, _ in trials])
correlation = np.corrcoef(first, second)[0, 1]
print(f"correlation of the two losses: {correlation:.5f}")
identity = np.abs(first - second - entropies).max()
print(f"largest |L1 - L2 - H(softmax(a))|: {identity:.1e}")

# %% [markdown]
# The two look alike because they differ by an entropy. For rows of $Q$ that sum to one,
# $L_1 = \mathrm{lse}(a) - \langle Q, a\rangle$ and
# $H(P) = \mathrm{lse}(a) - \langle P, a\rangle$, hence exactly
#
# $$L_1 - L_2 = H(\mathrm{softmax}(a)),$$
#
# and for logits this flat the entropy hardly varies. It is not a constant, though, and
# the gradients differ:
#
# $$\frac{\partial L_1}{\partial a_i} = P_i - Q_i, \qquad
# \frac{\partial L_2}{\partial a_i} = P_i - Q_i + P_i\,(a_i - \langle P, a\rangle).$$
#
# It has been argued that the last term vanishes. Its *sum over i* does; its elements do
# not, and with steeper logits they are as large as the gradient. What is true: with
# $P$ held constant, `stop_gradient`, the gradient of $L_2$ is $P - Q$ exactly. That
# is `linearized_softmax_cross_entropy`. Its value is still no cross-entropy: it may be
# negative, and is no minimum at $P = Q$.

# %%
for steepness in (1, 100):
    logits, targets = trials[0]
    logits = steepness * logits
    true_gradient = (jax.nn.softmax(logits) - targets) / len(logits)
    plain = jax.grad(loss_2)(logits, targets)
    stopped = jax.grad(
        lambda a, q: xent_jax.linearized_softmax_cross_entropy(a, q).mean()
    )(logits, targets)
    extra = plain - true_gradient
    norm = jnp.linalg.norm(true_gradient)
    print(f"logits times {steepness}:")
    print(f"  largest row sum of the extra term {jnp.abs(extra.sum(axis=1)).max():.1e}")
    print(f"  its size, relative to P - Q       {jnp.linalg.norm(extra) / norm:.1e}")
    print(
        "  with stop_gradient                "
        f"{jnp.linalg.norm(stopped - true_gradient) / norm:.1e}"
    )

# %% [markdown]
# ## Digits, without their labels
#
# 1347 images to learn from. Two random views of each, moved by up to a pixel and with
# noise, go through one small network. It gives features, and from them a direction in
# 32 dimensions that is compared with K = 60 prototypes.

# %%
BATCH = 256
CLUSTERS = 60

pixels, digits = load_digits(return_X_y=True)
train_images, test_images, train_labels, test_labels = train_test_split(
    (pixels / 16).astype(np.float32),
    digits.astype(np.int32),
    test_size=0.25,
    stratify=digits,
    random_state=SEED,
)
print(f"{len(train_labels)} images to learn from, {len(test_labels)} held out")


def view(key, images):
    """The images, each moved by up to a pixel, brightened or dimmed, and noisy."""
    moves, light, noise = jax.random.split(key, 3)
    corners = jax.random.randint(moves, (len(images), 2), 0, 3)
    padded = jnp.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    shifted = jax.vmap(
        lambda image, corner: jax.lax.dynamic_slice(image, corner, (8, 8))
    )(padded, corners)
    light = jax.random.uniform(light, (len(images), 1), minval=0.7, maxval=1.3)
    noise = 0.1 * jax.random.normal(noise, (len(images), 64))
    return shifted.reshape(-1, 64) * light + noise


class Network(nnx.Module):
    """Features of an image, and its similarities to the prototypes."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 256, rngs=rngs)
        self.output = nnx.Linear(256, 64, rngs=rngs)
        self.direction = nnx.Linear(64, 32, rngs=rngs)
        self.prototypes = nnx.Linear(32, CLUSTERS, use_bias=False, rngs=rngs)

    def features(self, images):
        return nnx.relu(self.output(nnx.relu(self.hidden(images))))

    def __call__(self, images):
        direction = self.direction(self.features(images))
        direction /= jnp.linalg.norm(direction, axis=-1, keepdims=True) + 1e-6
        kernel = self.prototypes.kernel[...]
        return direction @ (kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True))


# %% [markdown]
# ## Swapped prediction
#
# The scores of one view make the targets of the other, and the other way round. The
# student's softmax has its own temperature; no gradient flows through the targets, so
# the loss is an ordinary cross-entropy whose targets happen to come from the network.
# The last batch of an epoch is not full: `where=` leaves the padding out of the
# balancing and of the loss.


# %%
def objective(model, one, other, keep):
    loss = functools.partial(
        xent_jax.sinkhorn_cross_entropy, temperature=0.1, epsilon=0.05, where=keep
    )
    here, there = model(one), model(other)
    return xent_jax.weighted_mean((loss(here, there) + loss(there, here)) / 2, keep)


@nnx.jit
def step(model, optimizer, key, images, keep):
    one, other = (view(half, images) for half in jax.random.split(key))
    loss, gradients = nnx.value_and_grad(objective)(model, one, other, keep)
    optimizer.update(model, gradients)
    return loss


def batches(order):
    """Yields (images, keep) in the given order, always BATCH rows of each."""
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        padding = BATCH - len(rows)
        images = np.pad(train_images[rows], ((0, padding), (0, 0)))
        yield images, np.arange(BATCH) < len(rows)


# %% [markdown]
# What the features are worth is measured by a *linear probe*: a logistic regression on
# the features of a few labelled images, here 5 of each digit, scored on the held-out
# images. The average over 20 choices of those 50 labels:

# %%
PROBES = 20 if EPOCHS >= FULL_EPOCHS else 2


def probe(features):
    """The held-out accuracy of a linear probe on 50 labels, averaged."""
    known = np.asarray(features(train_images))
    held_out = np.asarray(features(test_images))
    choose = np.random.default_rng(SEED)
    accuracies = []
    for _ in range(PROBES):
        rows = np.concatenate(
            [
                choose.choice(np.flatnonzero(train_labels == digit), 5, replace=False)
                for digit in range(10)
            ]
        )
        # Not the default solver, with which scikit-learn 1.6 makes new SciPys warn.
        regression = LogisticRegression(max_iter=1000, solver="newton-cg")
        classifier = make_pipeline(StandardScaler(), regression)
        classifier.fit(known[rows], train_labels[rows])
        accuracies.append(classifier.score(held_out, test_labels))
    return float(np.mean(accuracies))


model = Network(nnx.Rngs(SEED))
raw = probe(lambda images: images)
untrained = probe(model.features)
print(f"held-out accuracy, linear probe, raw pixels: {raw:.4f}")
print(f"held-out accuracy, linear probe, untrained: {untrained:.4f}")

# %%
optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
shuffle = np.random.default_rng(SEED)
key = jax.random.key(SEED)
curve = []
progress = tqdm(range(EPOCHS), desc="swapped prediction")
for _ in progress:
    losses, counts = [], []
    for images, keep in batches(shuffle.permutation(len(train_labels))):
        key, now = jax.random.split(key)
        losses.append(step(model, optimizer, now, images, keep))
        counts.append(keep.sum())
    curve.append(np.average(jax.device_get(losses), weights=counts))
    progress.set_postfix(loss=f"{curve[-1]:.4f}")

trained = probe(model.features)
print(f"loss: {curve[0]:.3f} to {curve[-1]:.3f} (log K = {np.log(CLUSTERS):.3f})")
print(f"held-out accuracy, linear probe, trained: {trained:.4f}")

# %% [markdown]
# No prototype took everything: the held-out images, each at its most similar prototype,
# use nearly all of them. And most prototypes stand for one digit, although no label was
# used:

# %%
nearest = np.asarray(model(test_images).argmax(axis=-1))
table = np.zeros((CLUSTERS, 10), int)
np.add.at(table, (nearest, test_labels), 1)
used = (table.sum(axis=1) > 0).sum()
purity = table.max(axis=1).sum() / table.sum()
print(f"prototypes in use: {used} of {CLUSTERS}")
print(f"held-out images in the majority of their prototype: {purity:.4f}")

# %% [markdown]
# Top, the scores of the first section: assigned by softmax, three columns take almost
# everything; balanced, every prototype gets 8 of 96 samples; right, the column error by
# iteration. Bottom, the experiment: $L_2$ over $L_1$; how both change from one trial to
# the next (which the original calls gradients); and the training loss.

# %%
figure, axes = plt.subplot_mosaic(
    [["before", "after", "error"], ["losses", "changes", "curve"]],
    figsize=(12, 7),
    layout="constrained",
)
titles = {"before": "softmax", "after": "balanced"}
for name, assignment in {"before": before, "after": after}.items():
    picture = axes[name].imshow(assignment.T, aspect="auto", vmin=0, vmax=1)
    axes[name].set(title=titles[name], xlabel="sample", ylabel="prototype")
figure.colorbar(picture, ax=[axes["before"], axes["after"]])
for epsilon, error in errors.items():
    axes["error"].semilogy(COUNTS, error, marker=".", label=f"epsilon {epsilon}")
axes["error"].set(xlabel="iteration", ylabel="largest relative column error")
axes["error"].set_ylim(bottom=1e-7)
axes["error"].legend()
axes["losses"].scatter(first, second)
axes["losses"].set(xlabel="L1, cross-entropy", ylabel="L2, surrogate")
axes["losses"].ticklabel_format(useOffset=False)
axes["losses"].tick_params(axis="x", rotation=30)
axes["changes"].scatter(np.gradient(first), np.gradient(second))
axes["changes"].set(xlabel="change of L1", ylabel="change of L2")
axes["changes"].ticklabel_format(style="sci", scilimits=(0, 0))
axes["curve"].plot(range(1, EPOCHS + 1), curve)
axes["curve"].set(xlabel="epoch", ylabel="training loss per image (nats)")
if FIGURE:
    figure.savefig(FIGURE, dpi=120)

# %% [markdown]
# ## Check
#
# The identity holds to rounding, and features learned without labels are worth more
# than those of the untrained network.

# %%
if identity > 1e-5:
    raise RuntimeError(f"L1 - L2 is off H(softmax(a)) by {identity:.1e}")
if trained >= untrained + 0.03:
    print("check passed: the trained probe is at least 3 points above the untrained")
elif EPOCHS < FULL_EPOCHS:
    print(f"check skipped: {EPOCHS} of {FULL_EPOCHS} epochs")
else:
    raise RuntimeError(f"linear probe {trained:.4f}, untrained {untrained:.4f}")
