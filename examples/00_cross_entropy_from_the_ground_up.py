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
# # Cross-entropy from the ground up
#
# What a classifier is trained on: the loss and its gradient, derived and drawn; dense
# targets and class ids; softmax and sigmoid; what goes wrong, and by how much. Then,
# *in a training loop*, a masked, weighted, smoothed loss, for those who know PyTorch
# and are new to JAX.
#
# Five public tutorials print numbers for all of this, and not all are right. The last
# part, *what the tutorials print*, has every one of them beside ours and the true one.
#
# You need to know what an array is and what a derivative is. The data come with
# scikit-learn, nothing is downloaded, and the run takes less than half a minute on two
# CPU cores.

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
from decimal import Decimal

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
from xent_jax import verify

# %% [markdown]
# Two environment variables change a run: `XENT_JAX_EXAMPLE_EPOCHS` shortens the
# training (the check at the end then only prints), and `XENT_JAX_EXAMPLE_FIGURE` names
# a file to save the picture of the errors to.

# %%
FULL_EPOCHS = 30
EPOCHS = int(os.environ.get("XENT_JAX_EXAMPLE_EPOCHS", FULL_EPOCHS))
FIGURE = os.environ.get("XENT_JAX_EXAMPLE_FIGURE")
SEED = 0

# %% [markdown]
# ## The loss
#
# For every class $v$ a classifier gives a number $x_v$, a *logit*, which may be any
# number. Softmax makes probabilities of them:
#
# $$p_v = \frac{e^{x_v}}{\sum_u e^{x_u}}.$$
#
# The *targets* $y_v$ are probabilities too: how likely each class is in truth. The
# cross-entropy is the mean surprise $-\log p_v$ of what is true:
#
# $$\ell(x, y) = -\sum_v y_v \log p_v.$$
#
# The minus belongs to it: a logarithm of a probability is negative, and the loss is
# not. It is one number for each example, in nats.

# %%
logits = jnp.array([0.0, 5.0, 1.0])
targets = jnp.array([0.0, 0.8, 0.2])

p = jax.nn.softmax(logits)
print("probabilities    ", p)
print("by the definition", -(targets * jnp.log(p)).sum())
print("the loss         ", xent_jax.softmax_cross_entropy(logits, targets))

# %% [markdown]
# ## Its gradient
#
# Since $\log p_v = x_v - \log \sum_u e^{x_u}$, the loss is a *log-normalizer* minus a
# linear term:
#
# $$\ell(x, y) = \Big(\sum_v y_v\Big) \log \sum_u e^{x_u} - \sum_v y_v x_v.$$
#
# The derivative of $\log \sum_u e^{x_u}$ by $x_v$ is $e^{x_v} / \sum_u e^{x_u} = p_v$,
# and that of the linear term is $y_v$. So, with targets that sum to one,
#
# $$\frac{\partial \ell}{\partial x_v} = \Big(\sum_u y_u\Big) p_v - y_v = p_v - y_v :$$
#
# what is believed minus what is true.

# %%
gradient = jax.grad(xent_jax.softmax_cross_entropy)(logits, targets)
print("jax.grad", gradient)
print("p - y   ", p - targets)

# %% [markdown]
# A bar of the gradient that is below zero pulls its logit up, one above pushes it down.
# The bars of the gradient add up to zero. Where belief is nearly the truth, little
# moves (top); where the wrong class is believed in, its logit goes down nearly as fast
# as the right one goes up (bottom).

# %%
figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharey=True, layout="constrained")
rows = {"nearly right": targets, "wrong": jnp.array([0.0, 0.0, 1.0])}
for row, (name, y) in zip(axes, rows.items(), strict=True):
    bars = {"p, believed": p, "y, true": y, "p - y, the gradient": p - y}
    for axis, (title, values) in zip(row, bars.items(), strict=True):
        axis.bar(range(3), values, color=["C0" if v >= 0 else "C3" for v in values])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(3))
        axis.set_title(title if name == "nearly right" else "")
    row[0].set_ylabel(name)
for axis in axes[-1]:
    axis.set_xlabel("class")

# %% [markdown]
# ## Two logits: the loss as a landscape
#
# With two classes, of which class 0 is right,
#
# $$\ell = \log(e^{x_0} + e^{x_1}) - x_0 = \log(1 + e^{-m}), \qquad m = x_0 - x_1.$$
#
# Only the *margin* $m$ counts. Adding the same number to all logits changes nothing, so
# the contours are straight lines, and the arrows of $-\partial \ell / \partial x$ are
# at right angles to them. The landscape is convex: it has no other minimum to get
# stuck in, and none that is reached at a finite margin.
#
# With a negative margin the loss grows like $|m|$, and the pull does not grow beyond 1.
# With a positive one both fade like $e^{-m}$. Any number of classes looks like this,
# with the log-normalizer of the rivals, $\log \sum_{v \ne y} e^{x_v}$, for $x_1$.

# %%
grid = jnp.linspace(-6, 6, 61)
pairs = jnp.stack(jnp.meshgrid(grid, grid), axis=-1)  # [61, 61, 2]
first = jnp.zeros(pairs.shape[:-1], jnp.int32)
by_id = xent_jax.softmax_cross_entropy_with_integer_labels
surface = by_id(pairs, first)
descent = -jax.grad(lambda x: by_id(x, first).sum())(pairs)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
contours = left.contourf(grid, grid, surface, levels=np.arange(0, 13), cmap="viridis")
figure.colorbar(contours, ax=left, label="loss (nats)")
some = slice(5, None, 10)
arrows = descent[some, some]
left.quiver(grid[some], grid[some], arrows[..., 0], arrows[..., 1], color="white")
left.set(xlabel="logit of class 0, the right one", ylabel="logit of class 1")
left.set_aspect("equal")
along = pairs[30]  # x_1 = 0, so that x_0 is the margin
right.plot(along[:, 0], surface[30], label="loss")
right.plot(along[:, 0], descent[30, :, 0], label="pull on the logit of class 0")
right.plot(grid, jnp.maximum(-grid, 0), "k:", linewidth=1, label="max(-m, 0)")
right.set(xlabel="margin m", ylabel="loss (nats), pull (nats per unit of logit)")
_ = right.legend()

# %% [markdown]
# ## Dense targets and class ids
#
# When one class is certain, its number says all: $y$ is 1 there and 0 elsewhere, and
# what remains of the sum is
#
# $$\ell(x, y) = \log \sum_u e^{x_u} - x_y.$$
#
# No one-hot array is needed. Both functions return one loss per example: a batch of
# shape `[N, V]` gives `[N]`, not `[N, 1]`, and the mean is yours to take.

# %%
batch = jnp.array([[0.0, 5.0, 1.0], [2.0, 0.5, 1.0]])
ids = jnp.array([1, 0])
print("dense", xent_jax.softmax_cross_entropy(batch, jax.nn.one_hot(ids, 3)))
print("ids  ", xent_jax.softmax_cross_entropy_with_integer_labels(batch, ids))

# %% [markdown]
# ## log_softmax, then nll
#
# PyTorch also has the loss in two halves. `log_softmax` makes log-probabilities, and
# `nll_loss` takes minus the one of the right class; despite its name it takes no
# logarithm. Fed with something else than log-probabilities it returns a number all the
# same, even a negative one.

# %%
print("in two halves", xent_jax.nll_loss(jax.nn.log_softmax(batch), ids))
print("without the log_softmax", xent_jax.nll_loss(batch, ids), "(no loss of anything)")

# %% [markdown]
# ## Sigmoid: a question for each class
#
# Softmax answers *one* question: which class is it? Its probabilities compete, as they
# sum to one. The sigmoid $\sigma(x) = 1/(1 + e^{-x})$ answers a yes-or-no question for
# *each* class by itself, and the loss is per example and class:
#
# $$\ell(x, y) = -y \log \sigma(x) - (1 - y) \log(1 - \sigma(x)), \qquad
# \frac{\partial \ell}{\partial x} = \sigma(x) - y.$$
#
# The gradient is again belief minus truth, and no wonder: it is the softmax
# cross-entropy of the two logits $[0, x]$, "no" and "yes".
#
# Which one to use is a matter of the labels. *Exactly one class is right*: softmax.
# *Any number of classes may be right, none included*: sigmoid.

# %%
one_row = jnp.array([4.0, 6.5, 1.2])
two_right = jnp.array([1.0, 1.0, 0.0])
losses = xent_jax.sigmoid_binary_cross_entropy(one_row, two_right)
print("sigmoid of x, for x in [4, 6.5, 1.2]", losses)
no_yes = jnp.stack([jnp.zeros(3), one_row], axis=-1)
print("softmax of [0, x]                   ", by_id(no_yes, two_right.astype(int)))

# %% [markdown]
# The same logits, two readings. Softmax has to share: class 0 is left with 8 percent
# although its logit is high. The sigmoid says yes to all three.

# %%
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
readings = {"softmax": jax.nn.softmax(one_row), "sigmoid": jax.nn.sigmoid(one_row)}
for shift, (name, values) in zip((-0.2, 0.2), readings.items(), strict=True):
    bars = axis.bar(np.arange(3) + shift, values, width=0.4, label=name)
    axis.bar_label(bars, fmt="%.2f")
axis.set(ylabel="probability", ylim=(0, 1.4), yticks=(0, 0.5, 1))
axis.set_xticks(range(3), [f"class {v}\nlogit {x:.1f}" for v, x in enumerate(one_row)])
_ = axis.legend(ncols=2)

# %% [markdown]
# ## What goes wrong
#
# ### Softmax twice
#
# The losses take *logits*. Who passes probabilities has softmax applied to them once
# more, and nothing complains. But probabilities lie between 0 and 1: their softmax
# gives the right one of V classes at most $e / (e + V - 1)$, so that the loss has a
# floor, and hardly a slope. For three classes, however sure and right the model is:


# %%
def twice(x, y):
    return by_id(jax.nn.softmax(x), y)


print("margin  once       twice   pull once  twice")
for margin in (0.0, 2.0, 5.0, 10.0):
    x = jnp.array([margin, 0.0, 0.0])
    values = [loss(x, jnp.array(0)) for loss in (by_id, twice)]
    pulls = [-jax.grad(loss)(x, jnp.array(0))[0] for loss in (by_id, twice)]
    print(f"{margin:6} {values[0]:.6f} {values[1]:8.6f} {pulls[0]:.6f} {pulls[1]:.6f}")
print(f"the floor, log(1 + 2/e): {np.log(1 + 2 / np.e):.6f}")

# %% [markdown]
# ### Arguments swapped
#
# `loss(targets, logits)` runs too, when both are floats of one shape. No library can
# tell logits from targets then, and this one does not claim to. Two habits help: name
# the arguments, and use class ids where you have them, since an integer array is no
# logits and a float array holds no ids.

# %%
swapped = xent_jax.softmax_cross_entropy(targets, logits)
print(f"meant {xent_jax.softmax_cross_entropy(logits, targets):.4f}", end=", ")
print(f"swapped {swapped:.4f}, without a complaint")
try:
    xent_jax.softmax_cross_entropy_with_integer_labels(jnp.array(1), logits)
except TypeError as error:
    print(error)

# %% [markdown]
# ### log(0)
#
# In float32, $e^{-110}$ is 0. So a class that trails by 110 has the softmax 0, the
# logarithm of which is $-\infty$; the loss is infinite, and its gradient is NaN. The
# loss of the logits is 110, its gradient is $[1, -1]$.

# %%
wide = jnp.array([110.0, 0.0])


def log_of_softmax(x, y):
    return -jnp.log(jax.nn.softmax(x))[y]


for name, loss in {"-log(softmax(x))": log_of_softmax, "xent_jax": by_id}.items():
    value, slope = jax.value_and_grad(loss)(wide, jnp.array(1))
    print(f"{name:17} {value}, gradient {slope}")

# %% [markdown]
# A logit of $-\infty$ is a class that is ruled out: probability 0, by all means. Its
# target is 0 too, and $0 \cdot \infty$ must not be formed on the way.

# %%
ruled_out = jnp.array([0.0, -jnp.inf, 1.0])
certain = jnp.array([1.0, 0.0, 0.0])
print("optax   ", optax.softmax_cross_entropy(ruled_out, certain))
print("xent_jax", xent_jax.softmax_cross_entropy(ruled_out, certain))

# %% [markdown]
# ### Targets that do not sum to one
#
# Two classes are right, so the row of targets is $[1, 1, 0, 0]$. Softmax cross-entropy
# of it is a number, but neither that of a distribution nor that of two questions. Its
# gradient is $2p - y$, by the general formula above; TensorFlow returns $p - y$, which
# is the gradient of another function. Divide the row by its sum, if you mean "one of
# these two", or take the sigmoid, if you mean "both".

# %%
x = jnp.array([0.2, 0.7, 0.8, 0.1])
two = jnp.array([1.0, 1.0, 0.0, 0.0])
print("sum 2:     ", xent_jax.softmax_cross_entropy(x, two))
print("gradient   ", jax.grad(xent_jax.softmax_cross_entropy)(x, two))
print("2 p - y    ", 2 * jax.nn.softmax(x) - two)
print("normalized:", xent_jax.softmax_cross_entropy(x, two / 2))
print("sigmoid:   ", xent_jax.sigmoid_binary_cross_entropy(x, two).sum())

# %% [markdown]
# ### Confident rows in float32
#
# The textbook's cure for overflow subtracts the maximum, takes the logarithm of the sum
# and subtracts the label's logit. When the label leads by a margin $m$ that is
# $\log(1 + \varepsilon) - 0$ with $\varepsilon \approx e^{-m}$, and $1 + \varepsilon$
# has 24 bits: what is left of $\varepsilon$ loses one digit for every 2.3 of margin,
# and is 0 from about 17 on. The label's gradient, $p_y - 1$, goes the same way, while
# the rivals, whose $p_v$ are fine, are still pushed.
#
# Leave the label out of the sum, and nothing is subtracted:
#
# $$\ell = \log\Big(1 + e^{\,r - x_y}\Big), \qquad
# r = \log \sum_{v \ne y} e^{x_v}, \qquad
# \frac{\partial \ell}{\partial x_y} = -\frac{e^{\,r - x_y}}{1 + e^{\,r - x_y}}.$$
#
# That is what xent_jax computes, by `log1p`. Here are Optax's function, PyTorch's
# formula written out, and ours, against float64: 64 rows of ten classes for each
# margin, the worst of them in the picture. (Optax rounds the log-normalizer before it
# subtracts the label's logit, which costs a digit more.)


# %%
def torch_formula(x, y):
    """PyTorch's log_softmax, nll_loss and their backward pass; for the label only."""
    shifted = x - x.max(axis=-1, keepdims=True)
    log_p = shifted - jnp.log(jnp.exp(shifted).sum(axis=-1, keepdims=True))
    log_p = jnp.take_along_axis(log_p, y[:, None], axis=-1)[:, 0]
    return -log_p, jnp.exp(log_p) - 1


def with_label_gradient(loss):
    def both(x, y):
        gradient = jax.grad(lambda x: loss(x, y).sum())(x)
        return loss(x, y), jnp.take_along_axis(gradient, y[:, None], axis=-1)[:, 0]

    return both


FORMULAS = {
    "optax": with_label_gradient(optax.softmax_cross_entropy_with_integer_labels),
    "PyTorch's formula": torch_formula,
    "xent_jax": with_label_gradient(by_id),
}
MARGINS = np.arange(0, 40.5, 0.5)
ROWS = 64
generator = np.random.default_rng(SEED)
rows = generator.standard_normal((len(MARGINS), ROWS, 10)).astype(np.float32)
rows[..., 0] = rows[..., 1:].max(axis=-1) + MARGINS[:, None]
rows = rows.reshape(-1, 10)
labels = np.zeros(len(rows), np.int32)

exact = rows.astype(np.float64)
rivals = np.exp(exact[:, 1:] - exact[:, :1]).sum(axis=-1)
truth = np.log1p(rivals), -rivals / (1 + rivals)
errors = {
    name: [
        np.abs(np.asarray(got) / true - 1).reshape(-1, ROWS).max(axis=-1)
        for got, true in zip(jax.jit(formula)(rows, labels), truth, strict=True)
    ]
    for name, formula in FORMULAS.items()
}
for name, (of_loss, of_gradient) in errors.items():
    at = [list(MARGINS).index(margin) for margin in (5, 10, 20)]
    print(f"{name:18} loss", *(f"{e:.0e}" for e in of_loss[at]), end="   ")
    print("gradient", *(f"{e:.0e}" for e in of_gradient[at]))
print("(relative errors at the margins 5, 10 and 20)")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for axis, index in zip(axes, (0, 1), strict=True):
    styles = zip(errors.items(), ("C1-", "C2--", "C0-"), strict=True)
    for (name, error), style in styles:
        axis.semilogy(MARGINS, error[index], style, label=name)
    axis.axhline(2.0**-24, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("margin of the right class over its best rival")
axes[0].set(title="loss", ylabel="largest relative error", ylim=(1e-8, 5))
axes[1].set_title("gradient by the right class's logit")
axes[1].annotate("half an ulp of float32", (40, 2.0**-24), (40, 2e-8), ha="right")
axes[0].legend(loc="center right")
if FIGURE:
    figure.savefig(FIGURE, dpi=120)

# %% [markdown]
# ### Probabilities in place of logits
#
# Some models return probabilities, and `categorical_cross_entropy` and
# `binary_cross_entropy` take them (Keras's `from_logits=False`). What it costs: next to
# 1, float32 numbers are $6 \cdot 10^{-8}$ apart, and a probability tells a loss no
# better than that; and clipping, without which there would be a log(0), lets no loss
# fall below about $10^{-7}$. No loss function can bring back what rounding $p$ has
# lost. Keep the logits when you can.

# %%
print("margin  of the logits  of the probabilities    true")
for margin in (2.0, 8.0, 12.0, 16.0, 20.0):
    x = jnp.array([margin, 0.0])
    from_logits = xent_jax.softmax_cross_entropy(x, jnp.array([1.0, 0.0]))
    from_probs = xent_jax.categorical_cross_entropy(
        jax.nn.softmax(x), jnp.array([1.0, 0.0])
    )
    true = np.log1p(np.exp(-margin))
    print(f"{margin:6} {from_logits:14.7e} {from_probs:21.7e} {true:14.7e}")

# %% [markdown]
# ## In a training loop
#
# In PyTorch one call does it all, the mean included:
#
#     loss = F.cross_entropy(
#         logits, labels, weight=w, ignore_index=-100, label_smoothing=0.1
#     )
#     loss.backward()
#
# Here the losses come one per example, and the mean is a second step. The classes are
# on the last axis, and any number of axes may stand before it: logits
# `[batch, time, V]` have labels `[batch, time]`. Which examples count is a boolean
# array of the labels' shape, `where`; a dropped one has loss and gradient 0 whatever it
# holds. No class id is special, but one outside $[0, V)$ gives NaN unless `where` drops
# it.
#
# | `F.cross_entropy` | `softmax_cross_entropy_with_integer_labels` |
# |---|---|
# | `reduction="none"` | nothing: that is what it returns |
# | `ignore_index=-100` | `where=labels != -100` |
# | `weight=w` | `class_weights=w` |
# | `label_smoothing=0.1` | `label_smoothing=0.1` |
# | logits of shape `[N, C, H, W]` | `axis=1` |
# | `reduction="sum"` | `losses.sum()` |
# | `reduction="mean"` | `weighted_mean(losses, keep)`, see below |
# | a weight for each example | `weighted_mean(losses, weights)`, 0 if dropped |
# | probabilities as labels | `softmax_cross_entropy`, with the same options |
#
# (And `F.binary_cross_entropy_with_logits` with its `pos_weight` is
# `sigmoid_binary_cross_entropy` with the same.)
#
# Smoothing by $a$ and class weights $w$ change the targets to
# $t_v = w_v \big((1 - a)\,y_v + a / V\big)$, and no more than that: the loss is the
# cross-entropy of $t$, and its gradient is $(\sum_u t_u)\,p_v - t_v$.

# %%
x = jnp.array([[2.0, 0.5, 1.0], [0.1, 1.0, 3.0], [0.0, 5.0, 1.0], [9.0, 9.0, 9.0]])
labels = jnp.array([0, 1, 2, -100])
w = jnp.array([1.0, 2.0, 0.5])
keep = labels != -100

losses = by_id(x, labels, where=keep, class_weights=w, label_smoothing=0.1)
print("losses, the last one dropped:", losses)

# %% [markdown]
# *Which mean?* Over the rows that count, `weighted_mean(losses, keep)` divides by their
# number. PyTorch's mean under class weights divides by the sum of the weights of the
# labels instead; for that, write it out. For the batch above PyTorch 2.13 returns
# 1.94289.

# %%
weight_of_label = jnp.where(keep, w[jnp.where(keep, labels, 0)], 0)
as_torch = losses.sum() / weight_of_label.sum()
print(f"over the rows that count {xent_jax.weighted_mean(losses, keep):.5f}")
print(f"as PyTorch's mean        {as_torch:.5f}")

# %% [markdown]
# Now for real: digits of 8 by 8 pixels, with three difficulties. Only a tenth of the
# eights are there to learn from: they get a larger *class weight*. A fifth of the
# images was never labelled: their label is -100. And the last batch of an epoch is not
# full: it is padded, also with the label -100, so that every batch has the same shape
# and the step is compiled once.

# %%
BATCH = 128
CLASSES = 10

pixels, digits = load_digits(return_X_y=True)
train_images, test_images, train_labels, test_labels = train_test_split(
    (pixels / 16).astype(np.float32),
    digits.astype(np.int32),
    test_size=0.25,
    stratify=digits,
    random_state=SEED,
)
rare = (train_labels == 8) & (np.arange(len(train_labels)) % 10 != 0)
train_images, train_labels = train_images[~rare], train_labels[~rare]
train_labels[generator.random(len(train_labels)) < 0.2] = -100

counts = np.bincount(train_labels[train_labels >= 0], minlength=CLASSES)
class_weights = jnp.asarray(counts.mean() / counts, jnp.float32)
print("labelled images of each digit:", counts)
print("class weights:", np.round(counts.mean() / counts, 2))


def batches(order):
    """Yields (images, labels) in the given order, always BATCH rows of each."""
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        missing = BATCH - len(rows)
        yield (
            np.pad(train_images[rows], ((0, missing), (0, 0))),
            np.pad(train_labels[rows], (0, missing), constant_values=-100),
        )


# %% [markdown]
# What is different from PyTorch: there is no `backward()` that leaves gradients in the
# parameters. The loss is a function of the model, `nnx.value_and_grad` makes another
# function that also returns the gradient, and the optimizer takes that. `nnx.jit`
# compiles the step.


# %%
class Network(nnx.Module):
    """Two layers."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.output = nnx.Linear(64, CLASSES, rngs=rngs)

    def __call__(self, images):
        return self.output(nnx.relu(self.hidden(images)))


def objective(model, images, labels, class_weights):
    keep = labels != -100
    losses = xent_jax.softmax_cross_entropy_with_integer_labels(
        model(images),
        labels,
        where=keep,
        class_weights=class_weights,
        label_smoothing=0.1,
    )
    return xent_jax.weighted_mean(losses, keep)


adam = optax.adam(3e-3)


@nnx.jit
def step(model, optimizer, images, labels, class_weights):
    loss, gradients = nnx.value_and_grad(objective)(
        model, images, labels, class_weights
    )
    optimizer.update(model, gradients)
    return loss


def train(class_weights, description):
    model = Network(nnx.Rngs(SEED))
    optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)
    shuffle = np.random.default_rng(SEED)
    for _ in tqdm(range(EPOCHS), desc=description):
        for batch in batches(shuffle.permutation(len(train_labels))):
            step(model, optimizer, *batch, class_weights)
    return np.asarray(model(test_images).argmax(axis=-1))


found = {
    "equal": train(jnp.ones(CLASSES), "equal weights"),
    "class": train(class_weights, "class weights"),
}
accuracy = {name: np.mean(guess == test_labels) for name, guess in found.items()}
for name, guess in found.items():
    eights = np.mean(guess[test_labels == 8] == 8)
    print(f"held-out accuracy, {name} weights: {accuracy[name]:.4f}", end=", ")
    print(f"of the eights: {eights:.4f}")

# %% [markdown]
# That is all there is to it: `objective` is yours to change. With Linen, or with a
# dictionary of parameters of your own, it is the same function under
# `jax.value_and_grad`, and Optax makes the update; `01_digits` has such a step.

# %% [markdown]
# ## What the tutorials print
#
# Every number that the five tutorials print, beside ours in float32 and the true one
# (to 12 digits). A dash says that a number is right, to a unit of
# its last digit or to float32; otherwise its relative error stands there. Ours are
# computed here, and the notebook stops where one is off by more than 4 units in the
# last place of float32 (ulp), or what the device's own logarithm adds to that.

# %%
device = jax.devices()[0]
ALLOWED = 4 + verify.allowance_of(device, verify.primitive_errors(device))  # ulp
compared = []


def judged(text, true):
    """A dash for a number that is right as printed, else its relative error."""
    unit = 10.0 ** Decimal(text).as_tuple().exponent
    error, size = abs(float(text) - float(true)), abs(float(true))
    return "-" if error <= max(unit, 2.0**-23 * size) else f"{error / (size or 1):.0e}"


def beside(document):
    """Prints the numbers of a document, and stops where one of ours is off.

    An entry has the numbers as `printed`, the `true` ones, and `ours`; if the bound is
    not ALLOWED, the `bound` in ulp, or an `absolute` one on top; and if ours cannot be
    the true ones, what they are for the rounded input that the call is `given`.
    """
    for expression, entry in document.items():
        printed, true = entry["printed"].split(), entry["true"].split()
        ours = np.ravel(np.asarray(entry["ours"], np.float32))
        given = np.ravel(entry.get("given", np.array(true, float)))
        bound = entry.get("bound", ALLOWED) * 2.0**-23 * np.abs(given)
        bound += entry.get("absolute", 0.0)
        if not np.all(np.abs(ours - given) <= bound):
            raise RuntimeError(f"ours are off: {expression}: {ours}, {given}")
        print(f"\n{expression}")
        print(f"{'printed':>22}{'':9}{'ours':>16}{'':9}{'true':>20}")
        for text, own, exact in zip(printed, ours, true, strict=True):
            own = f"{own:.9g}"
            print(
                f"{text:>22} {judged(text, exact):8}{own:>16} {judged(own, exact):8}"
                f"{exact:>20}"
            )
        compared.extend(printed)


def log_softmax(x):
    """Log-probabilities of all classes: minus the loss, were each the right one."""
    every = [jnp.full(x.shape[:-1], v) for v in range(x.shape[-1])]
    return -jnp.stack([by_id(x, v) for v in every], axis=-1)


# %% [markdown]
# ### TensorFlow and PyTorch on the logits [0, 5, 1]
#
# The first tutorial writes the cross-entropy without its minus, and later puts one
# before a function that has it already. Its loss of class 1 is 0.024744948 by one way
# and 0.02474492 by another: both have lost digits, as in *confident rows* above. Then
# it hands the labels over as logits, and gets 0.6922.

# %%
x, y, onehot = logits, targets, jnp.array([0, 1, 0])
beside(
    {
        "tf.nn.softmax(logits)": {
            "printed": "0.00657326 0.9755587 0.01786798",
            "true": "0.00657326318531 0.975558754944 0.0178679818703",
            "ours": jnp.exp(log_softmax(x)),
            "bound": 5 * ALLOWED,  # exp of a rounded logarithm
        },
        "reduce_sum(labels * log(softmax(logits))): minus the loss": {
            "printed": "0.82474494",
            "true": "-0.824744890139",
            "ours": -xent_jax.softmax_cross_entropy(x, y),
        },
        "-softmax_cross_entropy_with_logits(labels, logits): a minus too many": {
            "printed": "0.82474494",
            "true": "-0.824744890139",
            "ours": -xent_jax.softmax_cross_entropy(x, y),
        },
        "-reduce_sum(onehot * log(softmax(logits))): log of a rounded p": {
            "printed": "0.024744948",
            "true": "0.0247448901388",
            "ours": xent_jax.softmax_cross_entropy(x, onehot),
        },
        "softmax_cross_entropy_with_logits, one-hot: log(1 + small)": {
            "printed": "0.02474492",
            "true": "0.0247448901388",
            "ours": xent_jax.softmax_cross_entropy(x, onehot),
        },
        "sparse_softmax_cross_entropy_with_logits: the same": {
            "printed": "0.02474492",
            "true": "0.0247448901388",
            "ours": by_id(x, jnp.array(1)),
        },
        "labels for logits, written out in PyTorch (0.8247 or 0.0247 was meant)": {
            "printed": "0.6922",
            "true": "0.692217048227",
            "ours": by_id(y, jnp.array(1)),
        },
        "labels for logits, CrossEntropyLoss": {
            "printed": "0.6922",
            "true": "0.692217048227",
            "ours": by_id(y, jnp.array(1)),
        },
    }
)

# %% [markdown]
# ### Softmax and sigmoid in TensorFlow 1
#
# The second tutorial says that the loss of a batch has the shape `[batch, 1]`; it is
# `[batch]`. Its third result is softmax twice. Its sigmoid losses are float64, where
# $\log(1 - \sigma(x))$ still does; in float32 the first of them would be 0.9 % off.

# %%
x = jnp.array([[2.0, 0.5, 1.0], [0.1, 1.0, 3.0]])
y = jnp.array([[0.2, 0.3, 0.5], [0.1, 0.6, 0.3]])
five = jnp.array(
    [[12, 3, 2], [3, 10, 1], [1, 2, 5], [4, 6.5, 1.2], [3, 6, 1]], dtype=jnp.float32
)
answers = jnp.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 0]])
beside(
    {
        "softmax_cross_entropy_with_logits": {
            "printed": "1.4143689 1.6642545",
            "true": "1.41436878411 1.66425452502",
            "ours": xent_jax.softmax_cross_entropy(x, y),
        },
        "-reduce_sum(labels * log(softmax))": {
            "printed": "1.4143689 1.6642545",
            "true": "1.41436878411 1.66425452502",
            "ours": xent_jax.softmax_cross_entropy(x, y),
        },
        "softmax twice (1.4144 and 1.6643 are the losses)": {
            "printed": "1.1718578 1.1757141",
            "true": "1.17185776554 1.17571409289",
            "ours": xent_jax.softmax_cross_entropy(jax.nn.softmax(x), y),
        },
        "sigmoid losses, by NumPy and by TensorFlow": {
            "printed": """
                6.14419348e-06 3.04858735 2.12692801
                3.04858735 4.53988992e-05 1.31326169
                1.31326169 2.12692801 0.00671534849
                0.0181499279 0.00150231016 1.46328247
                3.04858735 0.00247568514 1.31326169""",
            "true": """
                6.14419347773e-06 3.04858735157 2.12692801104
                3.04858735157 4.53988992169e-05 1.31326168752
                1.31326168752 2.12692801104 0.00671534848912
                0.0181499279178 0.00150231015975 1.46328246734
                3.04858735157 0.00247568513773 1.31326168752""",
            "ours": xent_jax.sigmoid_binary_cross_entropy(five, answers),
        },
    }
)

# %% [markdown]
# ### NumPy, TensorFlow and Keras side by side
#
# The third prints the same losses from logits and from probabilities. Keras 2 adds
# $10^{-7}$ inside both logarithms, so that the first binary loss comes out 2 % low. Of
# probabilities that were rounded to float32 ours is not the true loss of the logits
# either, and cannot be; it is held to the loss of those probabilities.

# %%
x, y = jnp.array([12.0, 3.0, 1.0, -1.0]), jnp.array([1, 0, 0, 1])
sigmoid = (1 / (1 + np.exp(-np.array(x, float)))).astype(np.float32)
right = jnp.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]])
softmax = np.exp(np.array(five, float))
softmax = (softmax / softmax.sum(axis=-1, keepdims=True)).astype(np.float32)

binary = "6.14419347773e-06 3.04858735157 1.31326168752 1.31326168752"
binary_given = -np.log(np.where(y, sigmoid, 1 - sigmoid.astype(float)))
categorical = (
    "0.000168795487089 0.00103475622472 3.06588390376 0.0834920679666 0.0549852353771"
)
categorical_given = -np.log(softmax[np.asarray(right) == 1].astype(float))
ROUNDED = 2.0**-23  # a probability near 1, twice
beside(
    {
        "sigmoid(logits)": {
            "printed": "0.99999386 0.95257413 0.73105858 0.26894142",
            "true": "0.999993855825 0.952574126822 0.731058578630 0.268941421370",
            "ours": jnp.exp(-xent_jax.sigmoid_binary_cross_entropy(x, jnp.ones(4))),
        },
        "binary, NumPy (float64)": {
            "printed": "6.14419348e-06 3.04858735 1.31326169 1.31326169",
            "true": binary,
            "ours": xent_jax.sigmoid_binary_cross_entropy(x, y),
        },
        "binary, tf.nn.sigmoid_cross_entropy_with_logits (float64)": {
            "printed": "6.14419348e-06 3.04858735 1.31326169 1.31326169",
            "true": binary,
            "ours": xent_jax.sigmoid_binary_cross_entropy(x, y),
        },
        "K.binary_crossentropy, from_logits=True (float32)": {
            "printed": "6.1441933e-06 3.0485873 1.3132617 1.3132617",
            "true": binary,
            "ours": xent_jax.sigmoid_binary_cross_entropy(x, y),
        },
        "K.binary_crossentropy of probabilities (float32)": {
            "printed": "6.0200873e-06 3.0485854 1.3132614 1.3132613",
            "true": binary,
            "ours": xent_jax.binary_cross_entropy(sigmoid, y),
            "given": binary_given,
            "absolute": ROUNDED,
        },
        "categorical, NumPy (float64)": {
            "printed": """
                0.000168795487 0.00103475622 3.0658839 0.083492068 0.0549852354""",
            "true": categorical,
            "ours": xent_jax.softmax_cross_entropy(five, right),
        },
        "categorical, softmax_cross_entropy_with_logits_v2 (float64)": {
            "printed": """
                0.000168795487 0.00103475622 3.0658839 0.083492068 0.0549852354""",
            "true": categorical,
            "ours": xent_jax.softmax_cross_entropy(five, right),
        },
        "K.categorical_crossentropy, from_logits=True (float32)": {
            "printed": "0.00016878611 0.001034678 3.0658839 0.08349213 0.054985214",
            "true": categorical,
            "ours": xent_jax.softmax_cross_entropy(five, right),
        },
        "K.categorical_crossentropy of probabilities (float32)": {
            "printed": "0.0001688146 0.0010347354 3.0658839 0.083492063 0.054985248",
            "true": categorical,
            "ours": xent_jax.categorical_cross_entropy(softmax, right),
            "given": categorical_given,
            "absolute": ROUNDED,
        },
    }
)

# %% [markdown]
# ### nll_loss and cross_entropy in PyTorch
#
# The fourth works two rows out by hand. It takes the logarithms of probabilities that
# it had rounded to four digits, which is where its table is off, and 5.2859 with it. It
# has the output -0.4500 and the text 0.45. It says that the logarithm makes the result
# positive: the minus does. Its last example has rows of labels that sum to two.

# %%
x = jnp.array([[0.2, 0.7, 0.8, 0.1], [0.1, 0.3, 0.5, 0.7]])
ids = jnp.array([0, 3])
both = jnp.array([[1, 1, 0, 0], [0, 0, 1, 1]])
pairs = jnp.array([[0, 1], [2, 3]])
of_pairs = by_id(jnp.stack([x, x], axis=1), pairs)
mean = "1.39651936617"
beside(
    {
        "F.nll_loss of what are no log-probabilities": {
            "printed": "-0.4500",
            "true": "-0.45",
            "ours": xent_jax.nll_loss(x, ids).mean(),
        },
        "the same in the text": {
            "printed": "0.45",
            "true": "-0.45",
            "ours": xent_jax.nll_loss(x, ids).mean(),
        },
        "F.cross_entropy of one-hot labels": {
            "printed": "1.3965",
            "true": mean,
            "ours": xent_jax.softmax_cross_entropy(x, jax.nn.one_hot(ids, 4)).mean(),
        },
        "F.cross_entropy of class ids": {
            "printed": "1.3965",
            "true": mean,
            "ours": by_id(x, ids).mean(),
        },
        "nll_loss of log_softmax": {
            "printed": "1.3965",
            "true": mean,
            "ours": xent_jax.nll_loss(log_softmax(x), ids).mean(),
        },
        "by hand, -(-1.682 - 1.1110) / 2": {
            "printed": "1.3965",
            "true": mean,
            "ours": by_id(x, ids).mean(),
        },
        "softmax, by hand": {
            "printed": "0.1860 0.3067 0.3390 0.1683 0.1807 0.2207 0.2695 0.3292",
            "true": """
                0.186023064446 0.306700183193 0.338956123033 0.168320629328
                0.180657171876 0.220655168011 0.269508830811 0.329178829301""",
            "ours": jnp.exp(log_softmax(x)),
            "bound": 2 * ALLOWED,
        },
        "its logarithm, by hand": {
            "printed": """
                -1.682 -1.1818 -1.0817 -1.7820
                -1.7109 -1.5109 -1.3111 -1.1110""",
            "true": """
                -1.68188461056 -1.18188461056 -1.08188461056 -1.78188461056
                -1.71115412178 -1.51115412178 -1.31115412178 -1.11115412178""",
            "ours": log_softmax(x),
        },
        "F.cross_entropy of two labels a row (normalized: 1.3215)": {
            "printed": "2.6430",
            "true": "2.64303873234",
            "ours": xent_jax.softmax_cross_entropy(x, both).mean(),
        },
        "the same by hand, the sum of both rows and its half": {
            "printed": "5.2859 2.64295",
            "true": "5.28607746468 2.64303873234",
            "ours": xent_jax.softmax_cross_entropy(x, both).sum() / jnp.array([1, 2]),
        },
        "the same as four nll_loss of log_softmax": {
            "printed": "2.6430",
            "true": "2.64303873234",
            "ours": of_pairs.sum() / 2,
        },
    }
)

# %% [markdown]
# ### A linear stand-in for the cross-entropy
#
# The fifth has logits $a$, and replaces $L_1 = -\sum_v q_v \log p_v$ by
# $L_2 = \sum_v (p_v - q_v)\,a_v$. It says that their gradients agree, since
# $p_v (a_v - b)$ vanishes for $b = \sum_u p_u a_u$. What it prints as evidence is the
# *sum* over $v$, which does vanish; the elements do not. `03_sinkhorn_targets` says
# what is true.

# %%
a = jnp.array([0.90457897, 0.08975555, 0.6955031, 0.74161145, 0.50095907])
p = jnp.array([0.02797057, 0.09509987, 0.27454503, 0.273575, 0.32880953])
b = (p * a).sum()
beside(
    {
        "b (the inputs are printed to 8 digits)": {
            "printed": "0.5923907183986392",
            "true": "0.592390718781972",
            "ours": b,
        },
        "the sum of p (a - b)": {
            "printed": "5.204170427930421e-17",
            "true": "0.0",
            "ours": (p * (a - b)).sum(),
            "absolute": ALLOWED * 2.0**-23,
        },
    }
)
print("\nthe elements of p (a - b):", p * (a - b))

# %% [markdown]
# Its experiment draws logits and costs at random, makes targets of the costs by
# Sinkhorn's iteration, and prints both losses of 20 trials, sorted, and what it calls
# their gradients, which are the changes from one trial to the next (`np.gradient`). It
# had no seed, so there is no true value of a loss; ours are another draw of the same
# experiment. But $L_1 - L_2$ must be the entropy of the softmax, which is just below
# $\log 64 \approx 4.15888$ for logits this small, and the changes follow from the
# losses.

# %%
PRINTED = {
    "L1": """
        4.15883989 4.15890663 4.15894403 4.15897117 4.15902341 4.15904347 4.1590823
        4.1590913 4.15910622 4.15913114 4.15913474 4.1591434 4.15914856 4.15916808
        4.15916826 4.15917904 4.15918445 4.15918608 4.15925961 4.15926385""",
    "L2": """
        0.00017298 0.00024753 0.00028277 0.00030974 0.00036783 0.0003804 0.00041808
        0.00043415 0.00044729 0.00047444 0.00047943 0.00048301 0.00049451 0.00050864
        0.00051069 0.0005161 0.00053111 0.00052533 0.00060765 0.0006024""",
    "change of L1": """
        6.67441917e-05 5.20709542e-05 3.22701985e-05 3.96937794e-05 3.61504422e-05
        2.94408723e-05 2.39134622e-05 1.19608872e-05 1.99222036e-05 1.42617498e-05
        6.12662792e-06 6.90728703e-06 1.23429982e-05 9.85375545e-06 5.47883732e-06
        8.09470613e-06 3.52000565e-06 3.75770611e-05 3.88866185e-05 4.24487449e-06""",
    "change of L2": """
        7.45563606e-05 5.48997609e-05 3.11016626e-05 4.2526114e-05 3.53301332e-05
        2.51239797e-05 2.68772106e-05 1.46074152e-05 2.0144721e-05 1.60698704e-05
        4.28303591e-06 7.54056029e-06 1.28157065e-05 8.08914041e-06 3.73246714e-06
        1.02123578e-05 4.61507539e-06 3.82697805e-05 3.85335993e-05 -5.25437451e-06""",
}


@jax.jit
def trial(logits, costs):
    """L1, L2 and the entropy of the softmax, each a mean over the rows."""
    logits = logits / logits.sum(axis=1, keepdims=True)
    targets = xent_jax.sinkhorn_targets(-costs, epsilon=0.5, num_iters=10)
    p = jax.nn.softmax(logits)
    return (
        xent_jax.softmax_cross_entropy(logits, targets).mean(),
        ((p - targets) * logits).sum(axis=1).mean(),
        xent_jax.softmax_cross_entropy(logits, p).mean(),
    )


draws = generator.random((20, 2, 128, 64)).astype(np.float32)
results = sorted(jax.device_get(trial(x**4, costs**1.5)) for x, costs in draws)
l1, l2, entropy = np.array(results).T
ours = {"L1": l1, "L2": l2}
ours |= {f"change of {name}": np.gradient(values) for name, values in ours.items()}
theirs = {name: np.array(text.split(), float) for name, text in PRINTED.items()}
follows = {f"change of {name}": np.gradient(theirs[name]) for name in ("L1", "L2")}

for change in ("", "change of "):
    columns = {"printed": 18, "another draw": 14}
    if change:
        columns["of the printed"] = 16
    head = "".join(f"{column:>{width}}" for column, width in columns.items())
    print(f"\n{change + 'L1':>18}{change + 'L2':>{sum(columns.values())}}")
    print(head + head)
    for i in range(20):
        for name in (change + "L1", change + "L2"):
            number = PRINTED[name].split()[i]
            true = f"{follows[name][i]:16.4g}" if change else ""
            print(f"{number:>18}{ours[name][i]:14.7g}{true}", end="")
            compared.append(number)
        print()

gap = theirs["L1"] - theirs["L2"]
print(f"\nL1 - L2: printed {gap.min():.6f} to {gap.max():.6f}", end=", ")
print(f"ours {(l1 - l2).min():.6f} to {(l1 - l2).max():.6f}")
print(f"ours, less the entropy of the softmax: {np.abs(l1 - l2 - entropy).max():.0e}")

# %% [markdown]
# ## Check
#
# Every number of the tables has been compared, or the notebook would have stopped. The
# experiment must agree too, and after a full training the class weights must have
# helped the rare digit.

# %%
print(f"{len(compared)} printed numbers compared")
if not np.abs(l1 - l2 - entropy).max() < 1e-5:
    raise RuntimeError("L1 - L2 is not the entropy of the softmax")
if not abs(l1.mean() - theirs["L1"].mean()) < 1e-4:
    raise RuntimeError(f"another draw has the mean {l1.mean()}, not near the printed")
if not all(np.abs(follows[n] - theirs[n]).max() < 1e-8 for n in follows):
    raise RuntimeError("the printed changes do not follow from the printed losses")
if not abs(as_torch - 1.94289) < 1e-5:
    raise RuntimeError(f"PyTorch's mean is 1.94289, this one {as_torch}")
eights = {name: np.mean(guess[test_labels == 8] == 8) for name, guess in found.items()}
if accuracy["class"] >= 0.93 and eights["class"] >= eights["equal"] + 0.3:
    print("check passed: the class weights found the rare digit")
elif EPOCHS < FULL_EPOCHS:
    print(f"check of the training skipped: {EPOCHS} of {FULL_EPOCHS} epochs")
else:
    raise RuntimeError(f"held-out accuracy {accuracy}, of the eights {eights}")
