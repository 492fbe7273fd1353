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
# # Distillation: learning what a teacher believes
#
# A teacher says more than which word comes next: it gives every word a probability. A
# smaller student learns to agree with it, by the Kullback-Leibler divergence from the
# teacher's distribution to its own. Written down, that takes the logits of both, two
# arrays of [tokens, classes], and their gradients.
#
# We train a teacher on text, and then the same small student three times: on the text
# alone; on the teacher's whole distribution, by
# `xent_jax.linear_softmax_kl_divergence`, which takes the features and kernels of the
# two heads and holds neither's logits; and on the teacher's 32 likeliest words a token,
# which are small enough to be kept in a file, by `linear_softmax_cross_entropy` with
# `label_probs`. Then we look at what the students learned and at the memory.
#
# The text is Python's own help, which every CPython has in `pydoc_data.topics`; nothing
# is downloaded. The run takes less than two minutes on two CPU cores, and the same code
# runs on a GPU or a TPU.

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
import collections
import os
import pydoc_data.topics
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import xent_jax

# %% [markdown]
# Two environment variables change a run: `XENT_JAX_EXAMPLE_EPOCHS` shortens or prolongs
# it (a shorter one also takes smaller epochs and skips the last check), and
# `XENT_JAX_EXAMPLE_FIGURE` names a file to save the figure to.

# %%
FULL_EPOCHS = 8
EPOCHS = int(os.environ.get("XENT_JAX_EXAMPLE_EPOCHS", FULL_EPOCHS))
FIGURE = os.environ.get("XENT_JAX_EXAMPLE_FIGURE")
SEED = 0
SMALL = EPOCHS < FULL_EPOCHS
BATCHES = 2 if SMALL else 25  # an epoch
BATCH = 512  # tokens
CONTEXT = 6  # tokens that are read to guess the next
CLASSES = 4096
WIDTHS = {"teacher": 128, "student": 16}  # features
TOP = 32  # classes a token that are kept of the teacher's
TEMPERATURE = 1.5  # of the divergence
MIB = 2**20

# %% [markdown]
# ## Words
#
# The most frequent words and signs are the classes, a space before a word belonging to
# it; class 0 stands for all others. A token is guessed from the six before it. Of every
# ten topics the last is held out.

# %%
topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
pieces = [re.findall(r" ?\w+|\s+|[^\w\s]+", text) for text in topics]
counts = collections.Counter(piece for topic in pieces for piece in topic)
ids = {piece: i for i, (piece, _) in enumerate(counts.most_common(CLASSES - 1), 1)}


def windows(topics):
    """Returns (contexts, labels) of every token with a whole context before it."""
    encoded = [np.array([ids.get(p, 0) for p in topic], np.int32) for topic in topics]
    cut = [
        np.lib.stride_tricks.sliding_window_view(tokens, CONTEXT + 1)
        for tokens in encoded
        if len(tokens) > CONTEXT
    ]
    every = np.concatenate(cut)
    return every[:, :-1], every[:, -1]


held_out = np.arange(len(pieces)) % 10 == 9
train_contexts, train_labels = (
    part[:: 16 if SMALL else 1]
    for part in windows(
        [topic for topic, out in zip(pieces, held_out, strict=True) if not out]
    )
)
test_contexts, test_labels = (
    part[:: 8 if SMALL else 1]
    for part in windows(
        [topic for topic, out in zip(pieces, held_out, strict=True) if out]
    )
)
print(f"{len(train_labels)} tokens to train on, {len(test_labels)} held out")
print(f"not among the {CLASSES - 1} classes: {np.mean(train_labels == 0):.1%}")

# %% [markdown]
# ## Teacher and student
#
# The same network in two widths. It ends before the head and returns features; the
# head's kernel, [features, classes], is a parameter of its own.


# %%
class Reader(nnx.Module):
    """Guesses the next token from the ones before it; returns features."""

    def __init__(self, features, rngs):
        self.embedding = nnx.Embed(CLASSES, features, rngs=rngs)
        self.up = nnx.Linear(CONTEXT * features, 4 * features, rngs=rngs)
        self.down = nnx.Linear(4 * features, features, rngs=rngs)
        scale = features**-0.5
        initial = scale * jax.random.normal(rngs.params(), (features, CLASSES))
        self.kernel = nnx.Param(initial)

    def __call__(self, contexts):
        read = self.embedding(contexts).reshape(len(contexts), -1)
        return self.down(nnx.gelu(self.up(read)))


def reader(kind):
    return Reader(WIDTHS[kind], nnx.Rngs(SEED))


def size(model):
    return sum(part.size for part in jax.tree.leaves(nnx.state(model, nnx.Param)))


print({kind: f"{size(reader(kind)):,} parameters" for kind in WIDTHS})

# %% [markdown]
# ## Three losses
#
# On the labels, the usual mean. On the teacher, with $q$ its probabilities and $p$ the
# student's, both at a temperature $T$, which makes the small probabilities count:
#
# $$\mathrm{KL}(q \,\|\, p) = \sum_v q_v (\log q_v - \log p_v), \qquad
# q = \mathrm{softmax}(x_{\mathrm{teacher}} / T), \quad
# p = \mathrm{softmax}(x_{\mathrm{student}} / T)$$
#
# Its gradient by the student's logits is $(p - q) / T$, and $p - q$ is itself of the
# size of $1 / T$. The factor $T^2$ undoes both, so that a learning rate need not be
# changed with the temperature; it is for us to write. The teacher is a constant of the
# loss.
#
# The third loss knows the K likeliest classes of each row of $q$, here at a temperature
# of 1: the cross-entropy with K ids a row. They leave out part of the teacher's
# probability. Divided by their sum and taken for the whole, they would teach that
# nothing else can follow; `label_smoothing` spreads the part that is left out, on
# average over the text, over all classes.


# %%
def label_loss(model, contexts, labels, _):
    return xent_jax.linear_softmax_cross_entropy(
        model(contexts), model.kernel, labels, reduction="mean"
    )


def teacher_loss(model, contexts, _, teaching):
    features, kernel = teaching
    return TEMPERATURE**2 * xent_jax.linear_softmax_kl_divergence(
        model(contexts),
        model.kernel,
        features,
        kernel,
        temperature=TEMPERATURE,
        reduction="mean",
    )


def top_loss(model, contexts, _, teaching):
    indices, probs, left_out = teaching
    return xent_jax.linear_softmax_cross_entropy(
        model(contexts),
        model.kernel,
        indices,
        label_probs=probs,
        label_smoothing=left_out,
        reduction="mean",
    )


# %% [markdown]
# ## Training
#
# The teacher is trained first, on the labels. Its top 32 are made once, a batch at a
# time; this is the one place where logits are written down, because `top_k` needs them.


# %%
def train(kind, loss_function, teaching, description):
    """Trains a new model; returns it, and how it does on held-out text each epoch."""
    model = reader(kind)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, *batch):
        loss, gradients = nnx.value_and_grad(loss_function)(model, *batch)
        optimizer.update(model, gradients)
        return loss

    shuffle = np.random.default_rng(SEED)
    results = [measure(model)]
    progress = tqdm(range(EPOCHS), desc=description)
    for _ in progress:
        order = shuffle.permutation(len(train_labels))[: BATCHES * BATCH]
        for rows in order.reshape(BATCHES, BATCH):
            batch = (train_contexts[rows], train_labels[rows], teaching(rows))
            step(model, optimizer, *batch)
        results.append(measure(model))
        progress.set_postfix(results[-1])
    return model, {name: [r[name] for r in results] for name in results[0]}


@nnx.jit
def losses_on_text(model, contexts, labels):
    statistics = xent_jax.linear_softmax_statistics(
        model(contexts), model.kernel, labels
    )
    return -statistics.log_prob, statistics.prediction


@nnx.jit
def divergences(model, teacher, contexts):
    return xent_jax.linear_softmax_kl_divergence(
        model(contexts), model.kernel, teacher(contexts), teacher.kernel
    )


teacher = None


def measure(model):
    """The held-out loss and, once there is a teacher, the divergence from it."""
    losses, predictions = losses_on_text(model, test_contexts, test_labels)
    result = {"loss": float(losses.mean())}
    if teacher is not None:
        result["divergence"] = float(divergences(model, teacher, test_contexts).mean())
        taught = losses_on_text(teacher, test_contexts, test_labels)[1]
        result["agreement"] = float(xent_jax.weighted_mean(predictions == taught))
    return result


teacher, teacher_curve = train("teacher", label_loss, lambda rows: None, "teacher")


@nnx.jit
def top_of_teacher(model, contexts):
    """Returns the likeliest classes of each token and their probabilities."""
    logits = model(contexts) @ model.kernel[...]
    largest, indices = jax.lax.top_k(logits, TOP)
    covered = jnp.exp(jax.nn.logsumexp(largest, -1) - jax.nn.logsumexp(logits, -1))
    return indices, jax.nn.softmax(largest), covered


parts = [
    jax.device_get(top_of_teacher(teacher, train_contexts[start : start + 4096]))
    for start in tqdm(range(0, len(train_labels), 4096), desc=f"top {TOP}")
]
indices, probs, covered = map(np.concatenate, zip(*parts, strict=True))
left_out = 1 - covered.mean()
kept = (indices.nbytes + probs.nbytes) / MIB
whole = 4 * len(train_labels) * CLASSES / MIB
print(f"top {TOP}: {kept:.0f} MiB; all probabilities would be {whole:.0f} MiB")
print(f"share of the teacher's probability in its top {TOP}: {covered.mean():.2f}")


@nnx.jit
def features_of_teacher(model, contexts):
    return model(contexts)


def whole_teacher(rows):
    features = features_of_teacher(teacher, train_contexts[rows])
    return features, teacher.kernel[...]


STUDENTS = {
    "labels": (label_loss, lambda rows: None),
    "teacher": (teacher_loss, whole_teacher),
    f"top {TOP}": (top_loss, lambda rows: (indices[rows], probs[rows], left_out)),
}
curves, students = {}, {}
for name, (loss_function, teaching) in STUDENTS.items():
    students[name], curves[name] = train("student", loss_function, teaching, name)

# %% [markdown]
# ## What the students learned
#
# The divergence from the teacher and the share of tokens where the likeliest word is
# the teacher's say how well a student copies it. The loss on held-out text is another
# question: it says how good a student is. The teacher is much better than its students
# here, and has something to teach: from as many tokens, those that see its
# probabilities have a smaller divergence and a lower loss than the one that sees the
# words. The top 32 tell less than the whole distribution, and bring the student's
# likeliest word closer to the teacher's than anything else.

# %%
print(f"held-out loss, teacher: {teacher_curve['loss'][-1]:.3f} nats")
for name, curve in curves.items():
    print(f"held-out loss, student of the {name}: {curve['loss'][-1]:.3f} nats", end="")
    print(f", divergence from the teacher {curve['divergence'][-1]:.3f} nats", end="")
    print(f", agreement {curve['agreement'][-1]:.3f}")

# %% [markdown]
# ## The same numbers as with logits
#
# Both heads' logits written out, for one batch: the divergence and its gradients by the
# student's features and kernel agree to rounding.


# %%
def divergence_of_heads(hidden, kernel, teacher_hidden, teacher_kernel):
    return xent_jax.linear_softmax_kl_divergence(
        hidden, kernel, teacher_hidden, teacher_kernel, reduction="mean"
    )


def divergence_of_logits(hidden, kernel, teacher_hidden, teacher_kernel):
    log_probs = jax.nn.log_softmax(hidden @ kernel)
    teacher_log_probs = jax.nn.log_softmax(teacher_hidden @ teacher_kernel)
    terms = jnp.exp(teacher_log_probs) * (teacher_log_probs - log_probs)
    return terms.sum(-1).mean()


student = students["teacher"]
batch = test_contexts[:256]
arrays = (student(batch), student.kernel[...], teacher(batch), teacher.kernel[...])
results = [
    jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(*arrays)
    for function in (divergence_of_heads, divergence_of_logits)
]
apart = max(
    float(jnp.abs(ours - dense).max() / jnp.abs(dense).max())
    for ours, dense in zip(*map(jax.tree.leaves, results), strict=True)
)
print(f"divergence {results[0][0]:.4f} nats; at most {apart:.0e} of the largest apart")

# %% [markdown]
# Of two distributions that are nearly equal, the written-out sum subtracts numbers that
# are a million times the result. `softmax_kl_divergence`, for logits that exist, adds
# terms none of which is negative, and keeps its digits; NumPy's float64 decides.

# %%
x = np.random.default_rng(SEED).standard_normal((4, 1000)).astype(np.float32)
near = x + np.float32(1e-4) * np.roll(x, 1)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


log_q, log_p = log_softmax(near.astype(np.float64)), log_softmax(x.astype(np.float64))
exact = (np.exp(log_q) * (log_q - log_p)).sum(-1)
log_q, log_p = map(jax.nn.log_softmax, (near, x))
plain = (jnp.exp(log_q) * (log_q - log_p)).sum(-1)
ours = xent_jax.softmax_kl_divergence(x, near)
print("float64    ", " ".join(f"{number:.4e}" for number in exact))
print("ours       ", " ".join(f"{number:.4e}" for number in ours))
print("written out", " ".join(f"{number:.4e}" for number in plain))

# %% [markdown]
# ## Memory
#
# What a program needs besides its arguments and results, as XLA plans it, for 4096
# tokens and a growing number of classes: the divergence and its gradients, by logits
# and by heads. Shapes are enough to compile; nothing runs.


# %%
def temporary_memory(function, classes, rows=4096):
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((rows, 64), (64, classes), (rows, 128), (128, classes))
    ]
    gradient = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
    analysis = gradient.lower(*shapes).compile().memory_analysis()
    return analysis.temp_size_in_bytes / MIB


SIZES = (32768,) if SMALL else (8192, 32768, 131072)
memory = {
    name: [temporary_memory(function, classes) for classes in SIZES]
    for name, function in {
        "logits": divergence_of_logits,
        "heads": divergence_of_heads,
    }.items()
}
print("temporary memory, MiB")
print(f"{'classes':>8} {'logits':>8} {'heads':>8}")
for classes, *sizes in zip(SIZES, *memory.values(), strict=True):
    print(f"{classes:8} " + " ".join(f"{size:8.0f}" for size in sizes))

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for name, curve in curves.items():
    axes[0].plot(curve["divergence"], "o-", label=name)
    axes[1].plot(curve["loss"], "o-", label=name)
axes[1].axhline(teacher_curve["loss"][-1], color="black", label="the teacher itself")
for axis, label in zip(axes, ("divergence from the teacher", "loss"), strict=False):
    axis.set(xlabel="epoch", ylabel=f"held-out {label} (nats)")
    axis.legend(title="student of the" if axis is axes[0] else None)
for name, sizes in memory.items():
    axes[2].loglog(SIZES, sizes, "o-", label=name)
axes[2].set_xticks(SIZES, SIZES, minor=False)
axes[2].set_xticks([], minor=True)
axes[2].set(xlabel="classes", ylabel="temporary memory (MiB)")
axes[2].legend()
if FIGURE:
    figure.savefig(FIGURE, dpi=120)

# %% [markdown]
# ## Check
#
# However short the run, the two ways must agree and the heads must need less than half
# the memory. After a full run, both students of the teacher must be closer to it than
# the one that has only seen the labels.

# %%
if not apart < 1e-4:
    raise RuntimeError(f"heads and logits are {apart:.0e} apart")
if not 2 * memory["heads"][-1] < memory["logits"][-1]:
    raise RuntimeError("the heads need half the memory of the logits or more")
closest = {name: curve["divergence"][-1] for name, curve in curves.items()}
if SMALL:
    print(f"check of the students skipped: {EPOCHS} of {FULL_EPOCHS} epochs")
elif max(closest["teacher"], closest[f"top {TOP}"]) < closest["labels"]:
    print("check passed: same numbers, less memory, students closer to their teacher")
else:
    raise RuntimeError(f"distilled students are not closer to the teacher: {closest}")
