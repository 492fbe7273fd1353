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
# # A vocabulary that outgrows a device
#
# The head of a language model with 4096 features and 131 072 classes has a kernel of
# 2 GiB in float32, a gradient of the same size, and Adam keeps two more such arrays.
# That is 8 GiB before there is a single logit, and every device of a data-parallel run
# has to hold it. So one shards the *vocabulary*: each device holds the kernel's columns
# of some of the classes, with their gradient and their optimizer state.
#
# Softmax then needs all devices for every token. Luckily it needs little of each: a few
# numbers a token, and in training the gradient of the token's features; never a logit.
# We train a head of 131 072 classes on a mesh of eight devices, *data* × *vocab*, and
# look at what each device holds and at what it sends. A CPU is made to look like eight
# devices; on real devices, the same code takes all that there are.
#
# The run takes a minute or two on two CPU cores. As a script it also runs as several
# processes, each with its share of the devices. Start these at the same time, in two
# terminals:
#
#     python 04_sharded_vocabulary.py --processes 2 --process 0
#     python 04_sharded_vocabulary.py --processes 2 --process 1
#
# On several hosts, `--coordinator` names one of them and a free port of it, the same in
# all processes.

# %% [markdown] tags=["start"]
# ## Before JAX starts
#
# How many devices a CPU pretends to be and which processes belong together has to be
# said before JAX looks for devices, so this comes before everything else. The settings
# of the CPU do nothing on other devices. With a single GPU or TPU the mesh is 1 × 1:
# all that follows runs, but nothing is sent. To see eight devices there, start Python
# with `JAX_PLATFORMS=cpu`.

# %% tags=["start"]
import argparse
import sys

import jax

parser = argparse.ArgumentParser()
parser.add_argument("--processes", type=int, default=1, help="how many there are")
parser.add_argument("--process", type=int, default=0, help="which of them this is")
parser.add_argument("--coordinator", default="127.0.0.1:9876", help="host:port")
# The command line of a notebook is that of its kernel.
options = parser.parse_args([] if "ipykernel" in sys.modules else None)
if jax.config.jax_num_cpu_devices < 1:
    jax.config.update("jax_num_cpu_devices", max(8 // options.processes, 1))
if options.processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(options.coordinator, options.processes, options.process)

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
import functools
import math
import os
import pydoc_data.topics
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import xent_jax

# %% [markdown]
# Two environment variables change a run: `XENT_JAX_EXAMPLE_EPOCHS` shortens or prolongs
# it, and `XENT_JAX_EXAMPLE_FIGURE` names a file to save the figure to. An epoch here is
# ten batches drawn at random. A shortened run also takes smaller batches and fewer
# features, and draws fewer shapes of the mesh; the vocabulary keeps its size.

# %%
FULL_EPOCHS = 15
EPOCHS = int(os.environ.get("XENT_JAX_EXAMPLE_EPOCHS", FULL_EPOCHS))
FIGURE = os.environ.get("XENT_JAX_EXAMPLE_FIGURE")
SEED = 0
SMALL = EPOCHS < FULL_EPOCHS
BATCHES = 3 if SMALL else 10  # an epoch
BATCH = 64 if SMALL else 512  # windows of text
FEATURES = 16 if SMALL else 64
CONTEXT = 16  # characters that the model sees
MIB = 2**20

# %% [markdown]
# ## The mesh
#
# Eight devices make a grid of 2 × 4. Along `data`, devices hold different rows of the
# batch; along `vocab`, different classes. Any number of devices works: an odd one makes
# a grid with one row. Neighbours in the grid's rows are neighbours in the list of
# devices, which is why `vocab` comes last. It is the axis along which more is sent, and
# between hosts, where the links are slow, there should be `data`.
#
# New versions of `jax.make_mesh` make the axes Explicit unless told otherwise. The
# library works on both types. On Explicit axes the head would do by itself what is
# written down here; Auto axes leave to XLA what we do not say, and we shall say what
# matters.

# %%
DEVICES = jax.device_count()


def mesh_of(data):
    """A grid of all devices, with so many along the axis of the data."""
    shape = data, DEVICES // data
    return jax.make_mesh(shape, ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)


MESH = mesh_of(2 if DEVICES % 2 == 0 and DEVICES > 2 else 1)
SHARDS = dict(MESH.shape)
if BATCH % SHARDS["data"]:
    raise ValueError(f"a batch of {BATCH} rows on {SHARDS['data']} devices")
print(f"{DEVICES} devices, {SHARDS}; this process has {jax.local_device_count()}")

# %% [markdown]
# ## The task, and a vocabulary that has to be padded
#
# Given sixteen characters of English, say the next three, *at once*: a class is a
# triple of characters. Of 49 characters, lower-case letters and the like, there are
# $49^3 = 117\,649$ triples. That is an odd number, and all shards of an array have to
# be of one size, so we pad the head to 131 072 classes. (Further if the number of
# devices does not divide that.) The array `real` says which classes there are. It
# is sharded as the classes are and goes to the loss as `class_mask`: a class that is
# not real has probability 0 and gradient 0.
#
# The text is Python's own help, in every CPython as `pydoc_data.topics`; nothing is
# downloaded. Every tenth topic is held out.

# %%
topics = [text.lower() for _, text in sorted(pydoc_data.topics.topics.items())]
frequent = collections.Counter("".join(topics)).most_common(48)
ALPHABET = (
    "".join(sorted(character for character, _ in frequent))
    + "\N{REPLACEMENT CHARACTER}"
)
SYMBOLS = len(ALPHABET)  # the last one stands for all other characters
TRIPLES = SYMBOLS**3
CLASSES = -(-131_072 // DEVICES) * DEVICES  # for any shape of the mesh
real_classes = np.arange(CLASSES) < TRIPLES


def corpus(texts):
    """Joins texts; returns the symbols, and for each the number of its text."""
    symbol = collections.defaultdict(lambda: SYMBOLS - 1)
    symbol |= {character: index for index, character in enumerate(ALPHABET)}
    symbols = [symbol[character] for character in "".join(texts)]
    return np.array(symbols), np.repeat(np.arange(len(texts)), list(map(len, texts)))


def windows(text, starts):
    """Returns the characters, the triples after them, and whether these are one text.

    A window that runs into the next topic asks for what nobody can know: `keep` is
    false there.
    """
    symbols, source = text
    window = symbols[starts[:, None] + np.arange(CONTEXT + 3)]
    labels = window[:, CONTEXT:] @ np.array([SYMBOLS**2, SYMBOLS, 1])
    keep = source[starts] == source[starts + CONTEXT + 2]
    return window[:, :CONTEXT].astype(np.int32), labels.astype(np.int32), keep


def spell(triple):
    """Returns the characters of a class."""
    return "".join(ALPHABET[triple // SYMBOLS**k % SYMBOLS] for k in (2, 1, 0))


train_text = corpus([text for index, text in enumerate(topics) if index % 10 != 2])
test_text = corpus(topics[2::10])
print(f"{len(train_text[0])} characters to train on, {len(test_text[0])} held out")
print(
    f"{TRIPLES} real classes of {CLASSES}; {spell(0)!r} is one, {spell(99_999)!r} too"
)

# %% [markdown]
# ## Where everything is
#
# Parameters are one dictionary, and a dictionary of the same form says how each is
# sharded. The small layers are the same on all devices, `P()`. The head's kernel is
# `[features, classes]`: all features and a part of the classes, `P(None, "vocab")`.
# Nothing is sharded over `data` but the batch.
#
# `make_array_from_callback` puts an array onto the mesh. It asks a process only for the
# parts that are on devices of its own, so it works alike for one process and for many.


# %%
def on_mesh(array, spec):
    return jax.make_array_from_callback(
        array.shape, NamedSharding(MESH, spec), lambda index: array[index]
    )


def initial_parameters():
    keys = jax.random.split(jax.random.key(SEED), 4)
    wide = 4 * FEATURES

    def normal(key, *shape):
        return jax.random.normal(key, shape) / math.sqrt(shape[0])

    return {
        "embedding": normal(keys[0], SYMBOLS, FEATURES),
        "layer": normal(keys[1], CONTEXT * FEATURES, wide),
        "output": normal(keys[2], wide, FEATURES),
        "kernel": normal(keys[3], FEATURES, CLASSES),
        "bias": jnp.zeros(CLASSES),
    }


SPECS = {
    "embedding": P(),
    "layer": P(),
    "output": P(),
    "kernel": P(None, "vocab"),
    "bias": P("vocab"),
}
BATCH_SPECS = P("data"), P("data"), P("data")  # characters, labels, keep


def features(parameters, characters):
    """The model up to its head: [rows, CONTEXT] to [rows, FEATURES]."""
    embedded = parameters["embedding"][characters] * math.sqrt(SYMBOLS)
    hidden = jax.nn.gelu(embedded.reshape(len(characters), -1) @ parameters["layer"])
    return hidden @ parameters["output"]


# %% [markdown]
# Adam's moments have the shapes of the parameters and have to be where these are.
# `optimizer.init` makes zeros, which do not depend on anything, so XLA would be free to
# put all of them on every device. `tree_map_params` finds what in the state belongs to
# a parameter; all else in it, a count of steps, is the same everywhere. With
# `out_shardings`, every device makes its own part: the whole kernel never exists.

# %%
optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, EPOCHS * BATCHES))


def initial():
    parameters = initial_parameters()
    return parameters, optimizer.init(parameters)


def shardings_of(mesh):
    """The shardings of the parameters and of the optimizer's state."""
    of_parameters = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    of_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(initial)[1],
        of_parameters,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    return of_parameters, of_state


parameters, state = jax.jit(initial, out_shardings=shardings_of(MESH))()
print("an array of rows × classes, which is the mesh itself:")
grid = on_mesh(np.zeros([8 * size for size in MESH.devices.shape]), P("data", "vocab"))
jax.debug.visualize_array_sharding(grid)
print("the kernel, features × classes (drawn as if it were a square):")
side = 8 * SHARDS["vocab"]
jax.debug.visualize_sharding((side, side), parameters["kernel"].sharding)

# %% [markdown]
# Every part of the kernel is on all devices of a column of the mesh, once for each part
# of the batch.
#
# ## The loss
#
# Inside `jax.shard_map` a function sees its device's part of every array, and the
# library has to be told what it cannot see:
#
# - `class_axis_name="vocab"`: the kernel, the bias and the mask are a slice of the
#   classes. Labels still count through all of them.
# - `batch_axis_name="data"`: the rows are a part of the batch. The mean is
#   $\sum_n w_n \ell_n / \sum_n w_n$ over *all* devices' rows. A mean of the devices'
#   means would be another number, since they need not keep equally many rows.
#
# Only the head is inside. The layers before it are ordinary code under `jax.jit`, and
# XLA follows the batch's sharding through them. The gradient is taken *outside*, of the
# `shard_map` as a whole; JAX then adds up what the devices know of each gradient. (By
# default it may be taken inside too. With `check_vma=False` it must not be: JAX would
# add up once more.)


# %%
def head_loss(hidden, kernel, bias, real, labels, keep, **axis_names):
    return xent_jax.linear_softmax_cross_entropy(
        hidden,
        kernel,
        labels,
        bias=bias,
        where=keep,
        class_mask=real,
        reduction="mean",
        **axis_names,
    )


def head_on(mesh):
    """The loss on a mesh, or on one device without any of this."""
    if mesh is None:
        return head_loss
    names = {"class_axis_name": "vocab", "batch_axis_name": "data"}
    head = SPECS["kernel"], SPECS["bias"], P("vocab")
    return jax.shard_map(
        functools.partial(head_loss, **names),
        mesh=mesh,
        in_specs=(P("data"), *head, P("data"), P("data")),
        out_specs=P(),
    )


def training_step(mesh):
    head = head_on(mesh)

    def step(parameters, state, real, characters, labels, keep):
        def objective(parameters):
            hidden = features(parameters, characters)
            kernel, bias = parameters["kernel"], parameters["bias"]
            return head(hidden, kernel, bias, real, labels, keep)

        loss, gradients = jax.value_and_grad(objective)(parameters)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    # A step may write the new parameters and moments over the old ones: it is given
    # them for good (donated), and nothing is held twice.
    out_shardings = None if mesh is None else (*shardings_of(mesh), None)
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)


# %% [markdown]
# ## What a device holds
#
# Shapes and shardings are enough to compile a step; no array need exist. The compiled
# program tells how much a device takes for its arguments, and for everything in between
# (temporary memory). Beside it, the same step for one device, which needs the whole
# kernel.


# %%
def compiled_step(mesh):
    """Compiles the training step for a mesh, or for one device; runs nothing."""
    batch = windows(train_text, np.zeros(BATCH, int))
    arrays = (*jax.eval_shape(initial), real_classes, *batch)
    if mesh is None:
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    else:
        others = [NamedSharding(mesh, spec) for spec in (P("vocab"), *BATCH_SPECS)]
        shapes = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            arrays,
            (*shardings_of(mesh), *others),
        )
    return training_step(mesh).lower(*shapes).compile()


def bytes_on_a_device(tree):
    """Adds up what this process's first device holds of the arrays."""
    device = jax.local_devices()[0]
    shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def whole_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


step, alone = compiled_step(MESH), compiled_step(None)
temporary = [s.memory_analysis().temp_size_in_bytes for s in (step, alone)]
rows = {
    "kernel": parameters["kernel"],
    "optimizer state": state,
    "all parameters and state": (parameters, state),
}
print(f"{'MiB':26} {'a device of the mesh':>20} {'one device alone':>20}")
for name, tree in rows.items():
    mesh_bytes, alone_bytes = bytes_on_a_device(tree), whole_bytes(tree)
    print(f"{name:26} {mesh_bytes / MIB:20.1f} {alone_bytes / MIB:20.1f}")
print(f"{'temporary, in a step':26}", end="")
print("".join(f" {size / MIB:20.1f}" for size in temporary))

# %% [markdown]
# ## What a device sends
#
# The text of a compiled program names every collective, an operation in which devices
# exchange something, with the groups of devices that do and the type of the result. On
# a mesh of 2 × 4, four devices are together along `vocab` and two along `data`. What
# stands there is one step, as long as a device's rows fit into one block of logits.
# (With more rows, the head loops over blocks, and what is in the loop is sent once a
# block; the sum of the sizes stays.)

# %%
COLLECTIVE = re.compile(
    r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def devices_together(groups):
    """Returns how many devices take part, the size of a group, in any of its forms."""
    if match := re.match(r"\{\{([\d,]+)\}", groups):  # {{0,1,2,3},{4,5,6,7}}
        return len(match[1].split(","))
    if match := re.match(r"\[\d+,(\d+)\]", groups):  # [2,4]<=[8]
        return int(match[1])
    # mesh['data'=2,'vocab'=4] {'vocab'}
    if match := re.match(r"mesh\[(.*?)\].*? \{('.*?)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return DEVICES


def collectives(compiled):
    """Yields (name, devices, arrays, bytes) of every collective of a program."""
    for line in compiled.as_text().splitlines():
        if (match := COLLECTIVE.search(line)) is None:
            continue
        types, name = match.groups()
        arrays = re.findall(r"([a-z]+)(\d*)\[([\d,]*)\]", types)
        size = sum(
            int(bits or 8) // 8 * math.prod(map(int, filter(None, shape.split(","))))
            for _, bits, shape in arrays
        )
        together = devices_together(line.partition("replica_groups=")[2])
        if together > 1:  # along an axis of one device, nothing is sent
            spelled = " ".join(f"{kind}{bits}[{shape}]" for kind, bits, shape in arrays)
            yield name, together, spelled, size


def bytes_sent(compiled):
    return sum(size for *_, size in collectives(compiled))


def print_collectives(compiled):
    found = collections.Counter(collectives(compiled))
    for key in sorted(found, key=lambda key: key[-1]):
        name, together, arrays, size = key
        print(f"  {found[key]} x {name}, {together} devices, {arrays}: {size} bytes")
    print(f"  in all {bytes_sent(compiled)} bytes")


print("the training step sends")
print_collectives(step)
logits = 4 * BATCH * CLASSES / DEVICES
print(f"(a device's part of the logits would be {logits / MIB:.0f} MiB)")

# %% [markdown]
# Along `vocab`: two numbers a row, the sum of exponentials and the label's logit, and
# before them one, the largest logit of another class than the label's, which keeps the
# exponentials in range; and `[rows, features]`, the gradient of the features, to which
# every class contributes. (The integer says whether the mask keeps any class.) Along
# `data`: the sums of the mean, and the gradients of the parameters, each device's part
# of the kernel among them, as in any data-parallel training.
#
# There is no all-gather: nobody ever sees all classes.
#
# ## Training
#
# A batch goes to the devices by its specs. For the first three steps the same model
# trains on one device too, from the same numbers: the losses must agree to rounding.
# (That is possible because this kernel still fits on one.)

# %%
rng = np.random.default_rng(SEED)
real = on_mesh(real_classes, P("vocab"))
alone_parameters, alone_state = jax.jit(initial)()
curve, alone_curve = [], []
quiet = jax.process_index() > 0
# Otherwise tqdm decides, by `TQDM_DISABLE`.
bar = functools.partial(tqdm, disable=True) if quiet else tqdm
for _ in (progress := bar(range(EPOCHS * BATCHES), desc="train")):
    starts = rng.integers(0, len(train_text[0]) - CONTEXT - 3, BATCH)
    batch = windows(train_text, starts)
    placed = [on_mesh(*pair) for pair in zip(batch, BATCH_SPECS, strict=True)]
    parameters, state, loss = step(parameters, state, real, *placed)
    curve.append(float(loss))
    if len(alone_curve) < 3:
        alone_parameters, alone_state, loss = alone(
            alone_parameters, alone_state, real_classes, *batch
        )
        alone_curve.append(float(loss))
    progress.set_postfix(loss=f"{curve[-1]:.4f}")
del alone_parameters, alone_state

for number, pair in enumerate(zip(curve, alone_curve, strict=False), 1):
    print("loss of step {}: on the mesh {:.6f}, alone {:.6f}".format(number, *pair))
apart = max(abs(a / b - 1) for a, b in zip(curve, alone_curve, strict=False))
print(f"they are at most {apart:.0e} of their size apart")
print(f"loss of the last step: {curve[-1]:.4f}")

# %% [markdown]
# ## What was learned
#
# `linear_softmax_statistics` takes the same names. Its results have a number a row: the
# label's log-probability, and the likeliest class among those of all devices. To
# compare with, a model that knows only how frequent each triple is.


# %%
def head_statistics(hidden, kernel, bias, real, labels, keep):
    statistics = xent_jax.linear_softmax_statistics(
        hidden,
        kernel,
        labels,
        bias=bias,
        where=keep,
        class_mask=real,
        class_axis_name="vocab",
    )
    correct = (statistics.prediction == labels).astype(jnp.float32)
    mean = functools.partial(
        xent_jax.weighted_mean, weights=keep, batch_axis_name="data"
    )
    return mean(-statistics.log_prob), mean(correct), statistics.prediction


# Results that all processes have as a whole can be printed by each.
@functools.partial(jax.jit, out_shardings=NamedSharding(MESH, P()))
def measure(parameters, real, characters, labels, keep):
    statistics = jax.shard_map(
        head_statistics,
        mesh=MESH,
        in_specs=(
            P("data"),
            SPECS["kernel"],
            SPECS["bias"],
            P("vocab"),
            P("data"),
            P("data"),
        ),
        out_specs=(P(), P(), P("data")),
    )
    hidden = features(parameters, characters)
    kernel, bias = parameters["kernel"], parameters["bias"]
    return statistics(hidden, kernel, bias, real, labels, keep)


every = np.arange(len(train_text[0]) - CONTEXT - 3)
_, train_labels, train_keep = windows(train_text, every)
seen = np.bincount(train_labels[train_keep], minlength=TRIPLES) + 1
starts = rng.integers(0, len(test_text[0]) - CONTEXT - 3, 4 * BATCH)
characters, labels, keep = test_batch = windows(test_text, starts)
frequency_loss = -np.log(seen[labels[keep]] / seen.sum()).mean()
placed = [on_mesh(*pair) for pair in zip(test_batch, BATCH_SPECS, strict=True)]
test_loss, accuracy, prediction = map(np.asarray, measure(parameters, real, *placed))
print(f"held-out loss, frequencies only: {frequency_loss:.3f} nats a triple")
print(f"held-out loss, model: {test_loss:.3f} nats a triple")
print(f"held-out accuracy, model: {accuracy:.3f} of the triples")
for row in range(5):
    before = "".join(ALPHABET[index] for index in characters[row])
    print(f"  after {before!r}: {spell(prediction[row])!r}, in truth", end=" ")
    print(repr(spell(labels[row])))

# %% [markdown]
# ## Losses of logits need no names
#
# Where logits exist anyway, there is a shorter way. Under plain `jax.jit`, call a loss
# as ever on arrays that are sharded: XLA splits the sums over the classes by itself and
# adds the all-reduces. Only the mask has to have the logits' shape, as nothing is
# broadcast unasked.
#
# The price is the logits themselves, and as much again in the gradient, where the fused
# head holds a block of them. What is sent are again a few numbers a row. (On a CPU two
# sums may be one complex number.)


# %%
@jax.jit
def logits_loss(parameters, real, characters, labels, keep):
    hidden = features(parameters, characters)
    logits = hidden @ parameters["kernel"] + parameters["bias"]
    losses = xent_jax.softmax_cross_entropy_with_integer_labels(
        logits, labels, where=keep[:, None] & real
    )
    return xent_jax.weighted_mean(losses, keep)


compiled_logits_loss = logits_loss.lower(parameters, real, *placed).compile()
logits_value = float(compiled_logits_loss(parameters, real, *placed))
print(f"held-out loss by sharded logits: {logits_value:.6f}, fused {test_loss:.6f}")
print("its value sends")
print_collectives(compiled_logits_loss)

# %% [markdown]
# ## Which mesh?
#
# The same step compiled for other shapes of the mesh. With `data` alone, every device
# holds the whole kernel and its optimizer state, and sends the kernel's whole gradient.
# The more devices along `vocab`, the smaller is each one's part of all that, and the
# more rows it has to go over; with `vocab` alone no gradient of a parameter is sent.

# %%
shapes = [SHARDS["data"]]
if not SMALL:
    shapes = [data for data in range(1, DEVICES + 1) if DEVICES % data == 0]
    shapes = [data for data in shapes if BATCH % data == 0]
held, between = {}, {}
grids = {f"{data} × {DEVICES // data}": data for data in reversed(shapes)}
for name, data in bar(grids.items(), desc="compile"):
    program = step if data == SHARDS["data"] else compiled_step(mesh_of(data))
    memory = program.memory_analysis()
    held[name] = memory.argument_size_in_bytes / MIB
    between[name] = memory.temp_size_in_bytes / MIB
    sent = bytes_sent(program) / MIB
    tqdm.write(
        f"{name}: {held[name]:.1f} MiB held, {between[name]:.1f} MiB temporary, "
        f"{sent:.2f} MiB in collectives"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.plot(range(1, len(curve) + 1), curve, label="on the mesh")
left.plot(range(1, 4), alone_curve, "o", color="black", label="on one device")
left.axhline(
    frequency_loss, color="gray", linestyle=":", label="frequencies only, held-out"
)
left.set(xlabel="step", ylabel="training loss per triple (nats)")
left.legend()
right.bar(list(held), list(held.values()), label="parameters, optimizer, batch")
right.bar(
    list(held), list(between.values()), bottom=list(held.values()), label="temporary"
)
right.set(xlabel="mesh, data × vocab", ylabel="memory of a device (MiB)")
right.legend()
if FIGURE and not quiet:
    figure.savefig(FIGURE, dpi=120)

# %% [markdown]
# ## Check
#
# However short the run: the mesh must have given the losses of one device, nothing may
# have been gathered, and each device must hold its part of the kernel and no more.
# After a full run, the model must know more than frequencies.

# %%
if not apart < 1e-3:
    raise RuntimeError(f"on the mesh the losses are {apart:.1e} off")
kinds = {name for name, *_ in collectives(step)}
if DEVICES > 1 and kinds != {"all-reduce"}:
    raise RuntimeError(f"expected all-reduces alone, got {sorted(kinds)}")
if bytes_on_a_device(parameters["kernel"]) * SHARDS["vocab"] != 4 * FEATURES * CLASSES:
    raise RuntimeError("the kernel is not sharded over the vocabulary")
if test_loss < frequency_loss:
    print("check passed: the losses of one device, and better than the frequencies")
elif SMALL:
    print(f"check of the held-out loss skipped: {EPOCHS} of {FULL_EPOCHS} epochs")
else:
    raise RuntimeError(f"held-out loss {test_loss:.3f}: nothing was learned")
