"""The Kullback-Leibler divergence of two rows of logits."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xent_jax._arguments import checks
from xent_jax._arguments.arrays import Axis, Layout
from xent_jax._forms.logits_arguments import changed_logits, read_given
from xent_jax._forms.rows import Given, row_results
from xent_jax._reductions.axis import AxisName
from xent_jax._reductions.precision import accumulation_dtype
from xent_jax._targets.teacher import Target, Teacher

Direction = Literal["forward", "reverse"]


@jax.named_scope("softmax_kl_divergence")
def softmax_kl_divergence(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    direction: Direction = "forward",
    temperature: ArrayLike = 1.0,
    class_axis_name: AxisName = None,
) -> jax.Array:
    """Kullback-Leibler divergence of a teacher's and a student's softmax, in nats.

        p = softmax(logits / temperature),  q = softmax(teacher_logits / temperature)
        forward: loss[n] = Σ_v q[n, v]·(log q[n, v] − log p[n, v])
        reverse: loss[n] = Σ_v p[n, v]·(log p[n, v] − log q[n, v])

    What distillation, trust regions and reference policies minimise. The divergence is
    a sum of non-negative terms: it is never negative, 0 for equal logits, and that of
    near distributions keeps its digits (a relative error of 1e-5 at 1e-9 nats). The
    gradient of the forward one is `(p − q) / temperature`, of the reverse one
    `p·(log p − log q − loss) / temperature`. There is no factor temperature², which
    some add to keep the gradient's size.

    The teacher is a constant: no gradient goes to it, nor to the temperature.

    Cost: both arrays are read three times for the value and once more for the gradient;
    a CPU takes more passes. The gradient keeps both and a few numbers a row.

    Args:
      logits: `float[..., V]`. The student's. `-inf` is a class of probability 0; a NaN,
        a `+inf` or a row of `-inf` only, here or in the teacher's, makes that row NaN.
      teacher_logits: `float[..., V]`, the shape of `logits`. A class that the first
        distribution (the teacher's of the forward divergence) lacks adds 0; one that it
        has and the other lacks makes the divergence `+inf`, in the reverse direction
        with a gradient of NaN.
      axis: The axis of the classes, or several, or `None` for all of them.
      where: `bool`, of the batch's shape (rows that count; a dropped row has loss and
        gradient exactly 0, whatever it holds) or of the shape of `logits` (classes that
        count, in both distributions; a row with nothing kept has loss and gradient 0).
      direction: `"forward"`, KL(teacher ‖ student), or `"reverse"`, KL(student ‖
        teacher).
      temperature: Positive; a number, or one a row in the shape of `logits` without
        `axis`. Divides both logits, in float32.
      class_axis_name: Inside `jax.shard_map`, the mesh axis (or axes) that the class
        axis is sharded over. Both logits and a `where` of their shape are then this
        shard's, of which all have as many classes. The loss is the same on all shards.
        It costs six all-reduces of 1 to 4 numbers a row, one more of 1 number with a
        `where` of the logits' shape, and one of 2 for a tangent.

    Returns:
      `float32[...]` (float64 for float64 logits), one divergence per example.
      Differentiable by `logits`, in every mode and order.

    Raises:
      TypeError: `logits` or `teacher_logits` are not floating, `where` is not boolean,
        `temperature` is not a real number, `class_axis_name` is no name.
      ValueError: A shape differs from what is said here (nothing is broadcast), an axis
        does not exist, there are no classes, `direction` is none of the two,
        `temperature` is not positive, `class_axis_name` is not an axis of the mesh of a
        `shard_map` around the call, or goes with several class axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from xent_jax import softmax_kl_divergence
      >>> jnp.set_printoptions(precision=4)
      >>> student = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
      >>> teacher = jnp.array([[1.0, -0.5, -0.5], [0.9, -1.2, 1.1]])
      >>> print(softmax_kl_divergence(student, teacher))
      [0.0151 0.    ]
      >>> print(softmax_kl_divergence(student, teacher, direction="reverse"))
      [0.0138 0.    ]

    References:
      Kullback and Leibler, *On Information and Sufficiency*, 1951.
      Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015.
    """
    function = "softmax_kl_divergence"
    check_direction(function, direction)
    temperature = checks.resolved(temperature)
    if isinstance(temperature, jax.Array):
        temperature = jax.lax.stop_gradient(temperature)
    layout, _, block, options = read_given(
        function, logits, axis, where, class_axis_name, temperature=temperature
    )
    teacher = read_teacher(layout, teacher_logits, block.logits.dtype)
    teacher = changed_logits(teacher, options)
    kind = Teacher(layout.class_axis, reverse=direction == "reverse")
    return layout.squeeze(row_results(Given(kind), block, Target(teacher)).loss)


def check_direction(function: str, direction: str) -> None:
    """Raises unless the direction is one of the two."""
    if direction not in ("forward", "reverse"):
        expected = "be 'forward' or 'reverse'"
        checks.fail(ValueError, function, "direction", expected, repr(direction))


def read_teacher(
    layout: Layout, teacher_logits: ArrayLike, dtype: jnp.dtype
) -> jax.Array:
    """Returns the teacher's logits, in the accumulation dtype, as constants."""
    name = "teacher_logits"
    array = checks.as_array(layout.function, name, teacher_logits)
    checks.check_floating(layout.function, name, array)
    meaning = f"that of {layout.name}"
    checks.check_shape(layout.function, name, array, layout.shape, meaning)
    array = layout.all_beside(jax.lax.stop_gradient(array))
    return layout.classes(array.astype(accumulation_dtype(dtype)))
