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
# # A language model: the same loss without the logits
#
# The last layer of a language model, its *head*, makes one logit for every token and
# every entry of the vocabulary. With a vocabulary of 32768 that array is far larger
# than anything else in a small model, and it is there only to be reduced to one number.
# We train the same model twice, side by side: with the usual *dense* head (a matmul,
# then Optax's cross-entropy of the logits), and with the *fused* head
# `xent_jax.linear_softmax_cross_entropy`, which takes the two factors of the matmul and
# never holds the logits. The only change is that one call. Then we compare the loss,
# the memory and the speed.
#
# The text is Python's own help, which every CPython has in `pydoc_data.topics`; nothing
# is downloaded. The run takes less than three minutes on two CPU cores, and the same
# code runs on a GPU or a TPU.

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
import time

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
# it, and `XENT_JAX_EXAMPLE_FIGURE` names a file to save the figure to. An epoch here is
# eight batches drawn at random, not the whole text; a shortened run also takes smaller
# epochs, compiles for one size of the vocabulary and measures on fewer sequences.

# %%
FULL_EPOCHS = 8
EPOCHS = int(os.environ.get("XENT_JAX_EXAMPLE_EPOCHS", FULL_EPOCHS))
FIGURE = os.environ.get("XENT_JAX_EXAMPLE_FIGURE")
SEED = 0
SMALL = EPOCHS < FULL_EPOCHS
BATCHES = 2 if SMALL else 8  # an epoch
BATCH = 16  # sequences
TIME = 128  # tokens a sequence
FEATURES = 64
CLASSES = 32768  # rows of the embedding, columns of the head
SIZES = (CLASSES,) if SMALL else (8192, CLASSES, 131072)  # to compile for
MIB = 2**20

# %% [markdown]
# ## Words and bytes
#
# A word that occurs more than once, with the space before it, is a token, and so is a
# run of spaces or of punctuation. What occurs only once is spelled in bytes, so that no
# text is without tokens. The ids are those of 256 bytes, then the words.
#
# That fills only a part of the head's 32768 classes. Real heads have such padding too,
# though less of it; the cost of a head is set by its size, filled or not. We shall come
# back to the padding when we measure the model.

# %%
topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
pieces = [re.findall(r" ?\w+|\s+|[^\w\s]+", text) for text in topics]
counts = collections.Counter(piece for topic in pieces for piece in topic)
words = [piece for piece, count in counts.items() if count > 1][: CLASSES - 256]
ids = {word: 256 + index for index, word in enumerate(words)}
vocabulary = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
real_classes = np.arange(CLASSES) < len(vocabulary)


def encode(pieces):
    """Returns the ids of the pieces of a text: of the piece, or of its bytes."""
    return [
        token
        for piece in pieces
        for token in ([ids[piece]] if piece in ids else piece.encode())
    ]


encoded = [encode(topic) for topic in pieces]
decoded = b"".join(vocabulary[token] for token in encoded[0]).decode()
print("decoding gives the first topic back:", decoded == topics[0])
print(f"{sum(map(len, topics))} characters, {sum(map(len, encoded))} tokens")
print(f"{len(vocabulary)} of {CLASSES} classes are in use")
print([vocabulary[token].decode(errors="replace") for token in encoded[0][:20]])

# %% [markdown]
# ## Sequences of one shape
#
# Each topic is cut into sequences, and each token's label is the token after it. The
# last sequence of a topic is too short and is padded; `keep` says which labels are
# real. Every tenth sequence is held out.


# %%
def sequences(tokens):
    """Yields (tokens, labels, keep) of one topic, TIME of each."""
    for start in range(0, len(tokens) - 1, TIME):
        window = tokens[start : start + TIME + 1]
        window = np.pad(np.array(window, np.int32), (0, TIME + 1 - len(window)))
        yield window[:-1], window[1:], np.arange(TIME) < len(tokens) - 1 - start


every = [sequence for tokens in encoded for sequence in sequences(tokens)]
data = [np.stack(part) for part in zip(*every, strict=True)]
held_out = np.arange(len(data[0])) % 10 == 9
train_data = [part[~held_out] for part in data]
test_data = [part[held_out][: BATCH if SMALL else None] for part in data]
print(f"{len(train_data[0])} sequences to train on, {len(test_data[0])} held out")
print(f"padding: {1 - data[-1].mean():.1%} of the labels")

# %% [markdown]
# ## The model
#
# Two Transformer blocks between an embedding and a head that are *tied*: the head's
# kernel is the transposed embedding, [features, classes]. The model ends before the
# head: it returns the features from which the logits would be made.


# %%
class Block(nnx.Module):
    """Causal attention, then two layers for each token."""

    def __init__(self, rngs):
        self.attention_norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=4, in_features=FEATURES, decode=False, rngs=rngs
        )
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.up = nnx.Linear(FEATURES, 4 * FEATURES, rngs=rngs)
        self.down = nnx.Linear(4 * FEATURES, FEATURES, rngs=rngs)

    def __call__(self, hidden):
        past = nnx.make_causal_mask(hidden[:, :, 0])
        hidden = hidden + self.attention(self.attention_norm(hidden), mask=past)
        return hidden + self.down(nnx.gelu(self.up(self.norm(hidden))))


class LanguageModel(nnx.Module):
    """Returns the features of every token, [batch, time, features]."""

    def __init__(self, classes, rngs):
        self.embedding = nnx.Embed(classes, FEATURES, rngs=rngs)
        self.positions = nnx.Embed(TIME, FEATURES, rngs=rngs)
        self.blocks = nnx.Sequential(Block(rngs), Block(rngs))
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)

    def __call__(self, tokens):
        positions = self.positions(jnp.arange(TIME))
        return self.norm(self.blocks(self.embedding(tokens) + positions[None]))

    def kernel(self):
        return self.embedding.embedding[...].T


# %% [markdown]
# ## Two heads, one loss
#
# Both compute the mean cross-entropy over the real labels. The dense head writes the
# logits down, [batch, time, classes], and differentiating it needs an array of that
# size again. The fused head takes a block of rows at a time: it makes the block's
# logits, its loss and at once its part of the gradient, then forgets the logits. That
# is three matmuls, as many as the dense head needs. A mean is asked for with
# `reduction="mean"`; without it there is a loss for every token.


# %%
def dense_loss(model, tokens, labels, keep):
    logits = model(tokens) @ model.kernel()
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(where=keep)


def fused_loss(model, tokens, labels, keep):
    return xent_jax.linear_softmax_cross_entropy(
        model(tokens), model.kernel(), labels, where=keep, reduction="mean"
    )


# %% [markdown]
# ## Memory
#
# XLA plans a program's memory when it compiles it, so we can ask before anything runs.
# `temp_size_in_bytes` is what a training step needs besides its arguments and results
# (parameters, Adam's moments and the batch, which are the same for both). For other
# sizes of the vocabulary the arrays need not even exist: shapes are enough to compile.


# %%
adam = optax.adam(1e-2)


def model_and_optimizer(classes=CLASSES):
    model = LanguageModel(classes, nnx.Rngs(SEED))
    return model, nnx.Optimizer(model, adam, wrt=nnx.Param)


def training_step(loss_function):
    @nnx.jit
    def step(model, optimizer, tokens, labels, keep):
        loss, gradients = nnx.value_and_grad(loss_function)(model, tokens, labels, keep)
        optimizer.update(model, gradients)
        return loss

    return step


def compiled_step(loss_function, classes=CLASSES):
    """Compiles a training step for the shapes of its arguments; runs nothing."""
    shapes = nnx.eval_shape(lambda: model_and_optimizer(classes))
    batch = [jax.ShapeDtypeStruct((BATCH, TIME), part.dtype) for part in data]
    return training_step(loss_function).lower(*shapes, *batch).compile()


LOSSES = {"dense": dense_loss, "fused": fused_loss}
steps = {}
memory = collections.defaultdict(dict)  # [head][classes], MiB
grid = [(n, c) for c in SIZES for n in LOSSES]
for name, classes in tqdm(grid, desc="compile"):
    step = compiled_step(LOSSES[name], classes)
    memory[name][classes] = step.memory_analysis().temp_size_in_bytes / MIB
    if classes == CLASSES:
        steps[name] = step

print("temporary memory of a training step, MiB")
print(f"{'classes':>8} {'logits':>8} {'dense':>8} {'fused':>8} {'dense/fused':>12}")
for classes, dense in memory["dense"].items():
    fused = memory["fused"][classes]
    logits = 4 * BATCH * TIME * classes / MIB
    print(f"{classes:8} {logits:8.0f} {dense:8.0f} {fused:8.0f} {dense / fused:12.1f}")

# %% [markdown]
# The dense head's memory grows with the logits, of which it needs about two copies. The
# fused head needs a block of logits, 64 MiB at these sizes, and arrays as large as the
# kernel. With 8192 classes all logits fit into one block, and little is saved; the gain
# grows with the vocabulary and with the batch.
#
# ## Training
#
# Both models start from the same numbers and see the same batches. They take turns, a
# step each, so that whatever else the machine does slows both.


# %%
def batches(rng):
    """Yields an epoch's batches, drawn without replacement."""
    order = rng.permutation(len(train_data[0]))[: BATCHES * BATCH]
    for rows in order.reshape(BATCHES, BATCH):
        yield [part[rows] for part in train_data]


rng = np.random.default_rng(SEED)
trained = {name: model_and_optimizer() for name in LOSSES}
curves = {name: [] for name in LOSSES}
rates = {name: [] for name in LOSSES}  # tokens a second, each step
with tqdm(total=EPOCHS * BATCHES, desc="train") as progress:
    for _ in range(EPOCHS):
        for batch in batches(rng):
            for name, step in steps.items():
                start = time.perf_counter()
                loss = float(step(*trained[name], *batch))
                rates[name].append(batch[-1].sum() / (time.perf_counter() - start))
                curves[name].append(loss)
            progress.set_postfix({name: f"{c[-1]:.4f}" for name, c in curves.items()})
            progress.update()

dense_curve, fused_curve = map(np.array, curves.values())
apart = np.max(np.abs(fused_curve / dense_curve - 1))
rate = {name: np.median(rates[name]) for name in LOSSES}
print(f"loss, first and last step: {fused_curve[0]:.4f} and {fused_curve[-1]:.4f}")
print(f"the two losses are at most {apart:.0e} of their size apart")
print(f"dense {rate['dense']:.0f} tokens/s, fused {rate['fused']:.0f} tokens/s")
print(f"fused/dense: {rate['fused'] / rate['dense']:.2f} in speed", end=", ")
print(f"{memory['fused'][CLASSES] / memory['dense'][CLASSES]:.2f} in memory")

# %% [markdown]
# The losses agree to rounding: both heads add up the same numbers in another order.
# Their speeds vary from machine to machine, and with what else it does; the memory does
# not vary from run to run.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
numbers = range(1, len(dense_curve) + 1)
left.plot(numbers, dense_curve, label="dense", linewidth=6, alpha=0.4)
left.plot(numbers, fused_curve, label="fused", color="black", linewidth=1)
left.set(xlabel="step", ylabel="training loss per token (nats)")
left.set_title("the same loss")
left.legend()
for name, color in {"dense": "C0", "fused": "black"}.items():
    right.loglog(
        list(memory[name]), list(memory[name].values()), "o-", label=name, color=color
    )
right.set_xticks(list(memory["dense"]), list(memory["dense"]), minor=False)
right.set_xticks([], minor=True)
right.set(xlabel="classes", ylabel="temporary memory of a step (MiB)")
right.set_title("without the logits")
right.legend()
if FIGURE:
    figure.savefig(FIGURE, dpi=120)

# %% [markdown]
# ## What was learned
#
# To judge a model one wants more than the loss: is the right token the likeliest one,
# and how sure is the model? `linear_softmax_statistics` goes over the classes once, a
# block of them at a time, and returns four numbers a token: the label's
# log-probability, the log-normalizer, the entropy and the likeliest class. Again there
# are no logits.
#
# Here the padding of the vocabulary matters. No label is ever a padded class, but each
# has a logit and so takes some probability away. `class_mask` drops those classes:
# their probability is 0, and the others sum to one. (It is free in training too. We
# left it out because the dense head would need yet another array of the logits' size
# for it.)
#
# The perplexity is the exponential of the mean loss: a model of that perplexity is as
# uncertain as if it had to choose among so many equally likely tokens. To compare with,
# a model that knows only how frequent each token is. Where the entropy is below the
# mean loss, the model is surer than it should be.


# %%
@nnx.jit
def measure(model, tokens, labels, keep):
    statistics = xent_jax.linear_softmax_statistics(
        model(tokens), model.kernel(), labels, where=keep, class_mask=real_classes
    )
    correct = (statistics.prediction == labels).astype(jnp.float32)
    values = {
        "loss": -statistics.log_prob,
        "accuracy": correct,
        "entropy": statistics.entropy,
    }
    return {name: xent_jax.weighted_mean(v, keep) for name, v in values.items()}


seen = np.bincount(train_data[1][train_data[2]], minlength=len(vocabulary)) + 1
surprise = -np.log(seen / seen.sum())
frequency_perplexity = np.exp(surprise[test_data[1][test_data[2]]].mean())
print(f"held-out perplexity, frequencies only: {frequency_perplexity:.1f}")
for name, (model, _) in trained.items():
    results = jax.device_get(measure(model, *test_data))
    perplexity = np.exp(results["loss"])
    print(f"held-out perplexity, {name} head: {perplexity:.1f}")
    print(f"held-out accuracy, {name} head: {results['accuracy']:.4f}")
    print(f"held-out loss, {name} head: {results['loss']:.3f} nats", end=", ")
    print(f"entropy {results['entropy']:.3f} nats")

# %% [markdown]
# ## Check
#
# However short the run, the two heads must have given the same losses, and the fused
# one must have needed less than half the memory. After a full run, the model must have
# learned more than the frequencies.

# %%
if not apart < 0.01:
    raise RuntimeError(f"the two heads' losses are {apart:.1%} apart")
if not 2 * memory["fused"][CLASSES] < memory["dense"][CLASSES]:
    raise RuntimeError("the fused head needs half the dense head's memory or more")
if perplexity < frequency_perplexity:
    print("check passed: same losses, less memory, better than the frequencies")
elif EPOCHS < FULL_EPOCHS:
    print(f"check of perplexity skipped: {EPOCHS} of {FULL_EPOCHS} epochs")
else:
    raise RuntimeError(f"held-out perplexity {perplexity:.1f}: nothing was learned")
