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
# # Policy gradients: REINFORCE, PPO, GRPO and DPO from log-probabilities
#
# A language model that is trained by rewards is a policy: it writes tokens, and what
# it has written is judged. All such losses are made of a few numbers a token, the
# log-probability of the token and the entropy of the distribution that it was drawn
# from, under the model and under older copies of it. `linear_softmax_statistics` gives
# them from the features and the kernel of the head, at the temperature that the tokens
# were drawn at, differentiable and without logits.
#
# We teach a small policy to count: given a first number and a step, to write what
# follows. It is trained from the same beginning by REINFORCE, which is one call of the
# loss with weights that may be negative; by the clipped ratios of PPO, with the
# advantages of GRPO and a bonus for entropy; and by DPO, on pairs of which one is
# better.
#
# Nothing is downloaded. The run takes less than two minutes on two CPU cores, and the
# same code runs on a GPU or a TPU.

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
from tqdm import tqdm

import xent_jax

# %% [markdown]
# Two environment variables change a run: `XENT_JAX_EXAMPLE_EPOCHS` shortens or prolongs
# it (an epoch is 25 updates; after a shorter run the check of what was learned is
# skipped), and `XENT_JAX_EXAMPLE_FIGURE` names a file to save the figure to.

# %%
FULL_EPOCHS = 12
EPOCHS = int(os.environ.get("XENT_JAX_EXAMPLE_EPOCHS", FULL_EPOCHS))
FIGURE = os.environ.get("XENT_JAX_EXAMPLE_FIGURE")
SEED = 0
UPDATES = 25  # an epoch
CLASSES = 16  # numbers, counted round
STEPS = 3  # to count by: 1, 2 or 3
LENGTH = 6  # numbers to write
GROUP = 32  # answers to one question
FEATURES = 64
TEMPERATURE = 1.2  # to draw at: above 1, so that more is tried

# %% [markdown]
# ## The task
#
# A question is a first number and a step. The reward of an answer is the share of its
# numbers that continue the one before them by the step. Chance gets 1/16. A quarter of
# the questions is held out.

# %%
first, step = np.divmod(np.arange(CLASSES * STEPS), STEPS)
questions = np.stack([first, step + 1], axis=-1).astype(np.int32)
held_out = (first + 5 * step) % 4 == 3
train_questions, test_questions = questions[~held_out], questions[held_out]
print(f"{len(train_questions)} questions to train on, {len(test_questions)} held out")


def before(questions, answers):
    """The number before each of an answer, the question's own first."""
    return jnp.concatenate([questions[..., :1], answers[..., :-1]], axis=-1)


def reward_of(questions, answers):
    right = (before(questions, answers) + questions[..., 1:]) % CLASSES
    return jnp.mean(answers == right, axis=-1)


# %% [markdown]
# ## The policy
#
# It sees the number before and the step, and returns features; the kernel of its head
# is a parameter of its own. Numbers are drawn one after another.


# %%
class Policy(nnx.Module):
    """Features of the next number, given the one before and the step."""

    def __init__(self, rngs):
        self.number = nnx.Embed(CLASSES, FEATURES, rngs=rngs)
        self.step = nnx.Embed(STEPS + 1, FEATURES, rngs=rngs)
        self.hidden = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        initial = jax.random.normal(rngs.params(), (FEATURES, CLASSES))
        self.kernel = nnx.Param(initial * FEATURES**-0.5)

    def __call__(self, numbers, steps):
        return nnx.gelu(self.hidden(nnx.gelu(self.number(numbers) + self.step(steps))))


def policy():
    return Policy(nnx.Rngs(SEED))


@nnx.jit
def draw(policy, questions, key):
    """Returns an answer to each question, int[..., LENGTH]."""

    def next_number(number, key):
        logits = policy(number, questions[..., 1]) @ policy.kernel[...]
        number = jax.random.categorical(key, logits / TEMPERATURE).astype(jnp.int32)
        return number, number

    keys = jax.random.split(key, LENGTH)
    _, answers = jax.lax.scan(next_number, questions[..., 0], keys)
    return jnp.moveaxis(answers, 0, -1)


@functools.partial(nnx.jit, static_argnames="temperature")
def statistics_of(policy, questions, answers, temperature=TEMPERATURE):
    """Log-probability and entropy of every number of the answers."""
    steps = jnp.broadcast_to(questions[..., 1:], answers.shape)
    features = policy(before(questions, answers), steps)
    return xent_jax.linear_softmax_statistics(
        features, policy.kernel, answers, temperature=temperature
    )


def groups_of(questions):
    """Each question as often as it is answered."""
    return jnp.repeat(jnp.asarray(questions)[:, None], GROUP, axis=1)


grouped = groups_of(train_questions)
answers = draw(policy(), grouped, jax.random.key(SEED))
rewards = reward_of(grouped, answers)
print(f"reward of the untrained policy: {rewards.mean():.3f}, chance {1 / CLASSES:.3f}")

# %% [markdown]
# Are these the numbers of the written-out distribution? The temperature belongs to the
# policy that is trained: log-probabilities at another temperature than the one drawn at
# are those of another policy.

# %%
statistics = statistics_of(policy(), grouped, answers)
steps = jnp.broadcast_to(grouped[..., 1:], answers.shape)
logits = policy()(before(grouped, answers), steps) @ policy().kernel[...]
log_probs = jax.nn.log_softmax(logits / TEMPERATURE)
drawn = jnp.take_along_axis(log_probs, answers[..., None], axis=-1)[..., 0]
entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
apart = max(
    float(jnp.abs(statistics.log_prob - drawn).max()),
    float(jnp.abs(statistics.entropy - entropy).max()),
)
print(f"log-probabilities and entropies are at most {apart:.0e} nats apart")

# %% [markdown]
# ## Advantages
#
# An answer is good or bad compared with the others to its question. GRPO subtracts the
# mean reward of the group and divides by its standard deviation. Every number of an
# answer has the advantage of the answer.


# %%
def advantages_of(rewards):
    centred = rewards - rewards.mean(-1, keepdims=True)
    return centred / (rewards.std(-1, keepdims=True) + 1e-4)


# %% [markdown]
# ## REINFORCE: a cross-entropy with negative weights
#
# The gradient of the expected reward is that of $\sum_t A_t \log \pi(a_t)$, so the loss
# is the cross-entropy of what was written, weighted by its advantage:
#
# $$\ell = -\frac{1}{N} \sum_t A_t \log \pi(a_t)$$
#
# Weights may be negative, and a bad answer's are. This is one call with
# `reduction="sum"`, three matmuls for the value and the gradient; a mean would divide
# by the sum of the advantages, which is about zero.


# %%
def reinforce_loss(policy, questions, answers, advantages, _):
    steps = jnp.broadcast_to(questions[..., 1:], answers.shape)
    total = xent_jax.linear_softmax_cross_entropy(
        policy(before(questions, answers), steps),
        policy.kernel,
        answers,
        weights=jnp.broadcast_to(advantages[..., None], answers.shape),
        temperature=TEMPERATURE,
        reduction="sum",
    )
    return total / answers.size


# %% [markdown]
# ## PPO and GRPO: clipped ratios
#
# To take several steps with the same answers, compare the policy with the one that
# wrote them: the ratio $r_t = \pi(a_t) / \pi_{\mathrm{old}}(a_t)$, an exponential of a
# difference of log-probabilities. Clipping it stops the pull on a number whose
# probability has moved by a fifth already:
#
# $$\ell = -\frac{1}{N} \sum_t \min\left(r_t A_t,\;
# \mathrm{clip}(r_t, 1 - \varepsilon, 1 + \varepsilon)\, A_t\right) - \beta \bar H$$
#
# The entropy $\bar H$ keeps the policy from being sure too early. Its gradient comes
# from the same pass.

# %%
CLIP = 0.2
ENTROPY = 0.03


def clipped_loss(policy, questions, answers, advantages, old_log_prob):
    statistics = statistics_of(policy, questions, answers)
    ratio = jnp.exp(statistics.log_prob - old_log_prob)
    advantages = advantages[..., None]
    gain = jnp.minimum(
        ratio * advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages
    )
    return -gain.mean() - ENTROPY * statistics.entropy.mean()


# %% [markdown]
# At the first step the ratio is 1 and nothing is clipped, so the gradient of the
# clipped loss (without the bonus) is that of REINFORCE.

# %%
advantages = advantages_of(rewards)
batch = (grouped, answers, advantages, statistics.log_prob)


def clipped_without_bonus(policy, *batch):
    entropy = statistics_of(policy, *batch[:2]).entropy
    return clipped_loss(policy, *batch) + ENTROPY * entropy.mean()


both = [
    jax.tree.leaves(nnx.jit(nnx.grad(loss))(policy(), *batch))
    for loss in (reinforce_loss, clipped_without_bonus)
]
gradients_apart = max(
    float(jnp.abs(one - other).max() / jnp.abs(one).max())
    for one, other in zip(*both, strict=True)
)
print(f"the two gradients are {gradients_apart:.0e} of the largest entry apart")

# %% [markdown]
# ## Training by rewards
#
# An update draws a group of answers to every question and takes one step (REINFORCE) or
# four (PPO). Whatever is printed or drawn of a policy is of held-out questions.


# %%
@nnx.jit
def held_out_of(policy, key):
    asked = groups_of(test_questions)
    answers = draw(policy, asked, key)
    statistics = statistics_of(policy, asked, answers)
    return reward_of(asked, answers).mean(), statistics.entropy.mean()


def train_by_rewards(loss_function, steps_an_update, description):
    """Returns the policy and its held-out reward and entropy after every update."""
    model = policy()
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer, key):
        answers = draw(model, grouped, key)
        advantages = advantages_of(reward_of(grouped, answers))
        old_log_prob = statistics_of(model, grouped, answers).log_prob
        batch = (grouped, answers, advantages, old_log_prob)
        for _ in range(steps_an_update):
            optimizer.update(model, nnx.grad(loss_function)(model, *batch))
        return held_out_of(model, key)

    keys = jax.random.split(jax.random.key(SEED + 1), EPOCHS * UPDATES)
    progress = tqdm(keys, desc=description)
    curve = [held_out_of(model, jax.random.key(SEED))]
    for key in progress:
        curve.append(update(model, optimizer, key))
    return model, np.array(jax.device_get(curve))


trained, curves = {}, {}
for name, (loss_function, steps_an_update) in {
    "REINFORCE": (reinforce_loss, 1),
    "PPO/GRPO": (clipped_loss, 4),
}.items():
    trained[name], curves[name] = train_by_rewards(loss_function, steps_an_update, name)
    reward, entropy = curves[name][-1]
    print(f"held-out reward, {name}: {reward:.3f}; entropy {entropy:.3f} nats")

# %% [markdown]
# ## DPO: pairs instead of rewards
#
# Of two answers to a question one is preferred. With $\pi_0$ the policy that training
# starts from, which stays as it is, DPO makes the preferred answer likelier by
#
# $$\ell = -\log \sigma\left(\beta \left[
# \log \frac{\pi(y_+)}{\pi_0(y_+)} - \log \frac{\pi(y_-)}{\pi_0(y_-)}\right]\right)$$
#
# An answer's log-probability is the sum of its numbers', and $-\log \sigma$ is the
# sigmoid cross-entropy of a yes. The pairs were all written by the untrained policy;
# nothing is drawn while training.

# %%
BETA = 0.3
PAIRS = 64  # a question


def log_prob_of(policy, questions, answers):
    return statistics_of(policy, questions, answers).log_prob.sum(-1)


def preference_loss(policy, questions, preferred, other, reference):
    better = log_prob_of(policy, questions, preferred)
    worse = log_prob_of(policy, questions, other)
    margin = BETA * (better - worse - reference)
    return xent_jax.sigmoid_binary_cross_entropy(margin, jnp.ones_like(margin)).mean()


start = policy()
asked = jnp.repeat(jnp.asarray(train_questions), PAIRS, axis=0)
two = [draw(start, asked, key) for key in jax.random.split(jax.random.key(SEED + 2))]
gains = reward_of(asked, two[0]) - reward_of(asked, two[1])
preferred, other = (
    jnp.where((gains > 0)[:, None], *pair) for pair in (two, reversed(two))
)
differ = gains != 0
asked, preferred, other = asked[differ], preferred[differ], other[differ]
print(f"{len(asked)} pairs of which one is better")
reference = log_prob_of(start, asked, preferred) - log_prob_of(start, asked, other)

model = policy()
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def preference_step(model, optimizer, key):
    batch = (asked, preferred, other, reference)
    optimizer.update(model, nnx.grad(preference_loss)(model, *batch))
    return held_out_of(model, key)


curve = [held_out_of(model, jax.random.key(SEED))]
keys = jax.random.split(jax.random.key(SEED + 3), EPOCHS * UPDATES)
for key in tqdm(keys, desc="DPO"):
    curve.append(preference_step(model, optimizer, key))
trained["DPO"], curves["DPO"] = model, np.array(jax.device_get(curve))
reward, entropy = curves["DPO"][-1]
print(f"held-out reward, DPO: {reward:.3f}; entropy {entropy:.3f} nats")

# %% [markdown]
# ## What was learned
#
# An answer to a held-out question by each policy, and the rewards on the way. DPO has
# seen nothing but what the untrained policy wrote, where one number in sixteen was
# right. The policies that draw their own answers stop short of a reward of 1 once their
# entropy is near zero: when all of a group make the same mistake, their advantages are
# zero, and nothing corrects it.

# %%
question = jnp.asarray(test_questions[-1])
for name, model in {"untrained": policy(), **trained}.items():
    answer = draw(model, question, jax.random.key(SEED))
    print(f"from {question[0]} by {question[1]}, {name}: {answer.tolist()}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, curve in curves.items():
    left.plot(curve[:, 0], label=name)
    right.plot(curve[:, 1], label=name)
left.axhline(1 / CLASSES, color="black", linestyle=":", label="chance")
left.set(xlabel="update", ylabel="held-out reward", ylim=(0, 1))
right.set(xlabel="update", ylabel="held-out entropy of a number (nats)")
left.legend()
if FIGURE:
    figure.savefig(FIGURE, dpi=120)

# %% [markdown]
# ## Check
#
# However short the run, the log-probabilities must be those of the distribution, and
# the first step of PPO that of REINFORCE. After a full run every policy must be right
# ten times as often as chance is.

# %%
if not max(apart, gradients_apart) < 1e-4:
    raise RuntimeError(f"statistics {apart:.0e}, gradients {gradients_apart:.0e} apart")
final = {name: float(curve[-1, 0]) for name, curve in curves.items()}
if EPOCHS < FULL_EPOCHS:
    print(f"check of the rewards skipped: {EPOCHS} of {FULL_EPOCHS} epochs")
elif min(final.values()) > 10 / CLASSES:
    print("check passed: the policies have learned to count")
else:
    raise RuntimeError(f"held-out rewards {final}: too little was learned")
