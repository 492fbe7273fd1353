"""What every loss is, in float64 NumPy and in 50-digit arithmetic.

An oracle takes the inputs as they are (rounded to the dtype under test), computes in
float64 and returns NumPy arrays: the loss, and the gradients of the sum of the losses
in closed form. Only JAX is kept out, so that an error cannot hide on both sides.

Differences that float64 would lose are never formed. Of each row the largest logit k is
left out of the normalizer: with r = Σ_{j≠k} exp(x_j − x_k),

    −log p_j = (x_k − x_j) + log1p(r),    p_k = 1 / (1 + r),    1 − p_k = r / (1 + r),

so a confident row keeps all its digits. `exact_softmax_cross_entropy` and
`exact_sigmoid_binary_cross_entropy` are the plain formulas in 50 digits (mpmath): the
truth for float64 losses, and what the float64 oracles themselves are checked against.
"""

from typing import Any, NamedTuple

import numpy as np

# Bits of the significand, and exponent of the smallest normal number.
_FORMATS = {
    "bfloat16": (8, -126),
    "float16": (11, -14),
    "float32": (24, -126),
    "float64": (53, -1022),
}


class Loss(NamedTuple):
    """A loss per example and the gradients of the sum of the losses."""

    value: np.ndarray
    gradient: np.ndarray
    label_gradient: np.ndarray | None = None


def ulp_error(computed: Any, truth: Any, dtype: Any) -> np.ndarray:
    """Returns |computed − truth| in units in the last place of `dtype` at the truth.

    `truth` holds float64 numbers or mpmath's. Equal infinities, and a NaN that should
    be one, count 0; any other number that is not finite counts inf.
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    bits, lowest = _FORMATS[name]
    computed = np.asarray(computed).astype(np.float64)
    truth = np.asarray(truth)
    rounded = truth.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.abs((computed - truth).astype(np.float64))
    exponent = np.frexp(rounded)[1] - 1
    error = np.ldexp(difference, bits - 1 - np.maximum(exponent, lowest))
    same = (computed == rounded) | (np.isnan(computed) & np.isnan(rounded))
    finite = np.isfinite(computed) & np.isfinite(rounded)
    return np.where(finite, error, np.where(same, 0.0, np.inf))


def softmax_cross_entropy(
    logits: Any,
    labels: Any,
    axis: int | tuple[int, ...] = -1,
    where: Any = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Any = None,
    z_loss: float = 0.0,
) -> Loss:
    """Dense targets: Σ_j t_j·(−log p_j) + z_loss·lse², t = w·((1 − a)·y + a / V)."""
    rows, batch, restore = _class_rows(logits, axis)
    targets, _, _ = _class_rows(labels, axis)
    keep = _kept(where, rows.shape, batch, axis)
    weights = _flat_weights(class_weights, rows.shape[-1])
    label_factor = (1 - label_smoothing) * weights
    values, gradients, label_gradients = [], [], []
    for x, y, kept in zip(rows, targets, keep, strict=True):
        smooth = label_smoothing / max(kept.sum(), 1)
        t = label_factor * y + smooth * weights
        value, gradient, surprisal = _softmax_row(x, t, kept, z_loss)
        values.append(value)
        gradients.append(gradient)
        slope = _times(label_factor, surprisal)
        label_gradients.append(np.where(np.isnan(surprisal), np.nan, slope))
    return Loss(
        np.array(values).reshape(batch),
        restore(np.array(gradients).reshape(rows.shape)),
        restore(np.array(label_gradients).reshape(rows.shape)),
    )


def softmax_cross_entropy_with_integer_labels(
    logits: Any,
    labels: Any,
    axis: int | tuple[int, ...] = -1,
    where: Any = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Any = None,
    z_loss: float = 0.0,
) -> Loss:
    """Class ids: the dense loss of the one-hot row.

    An id outside [0, V) makes its row NaN; an id that names a dropped class makes the
    loss +inf and leaves the gradient of the kept classes as it was.
    """
    rows, batch, restore = _class_rows(logits, axis)
    size = rows.shape[-1]
    keep = _kept(where, rows.shape, batch, axis)
    weights = _flat_weights(class_weights, size)
    values, gradients = [], []
    for x, y, kept in zip(rows, np.asarray(labels).reshape(-1), keep, strict=True):
        one_hot = np.arange(size) == int(y)
        if kept.any() and not one_hot.any():
            values.append(np.nan)
            gradients.append(np.where(kept, np.nan, 0.0))
            continue
        smooth = label_smoothing / max(kept.sum(), 1)
        t = weights * ((1 - label_smoothing) * one_hot + smooth * kept)
        lost = float((t * one_hot)[~kept].sum()) if kept.any() else 0.0
        value, gradient, _ = _softmax_row(x, t, kept, z_loss, lost)
        values.append(value)
        gradients.append(gradient)
    return Loss(
        np.array(values).reshape(batch),
        restore(np.array(gradients).reshape(rows.shape)),
    )


def softmax_cross_entropy_with_sparse_targets(
    logits: Any,
    indices: Any,
    probs: Any,
    axis: int = -1,
    where: Any = None,
    **options: Any,
) -> Loss:
    """Dense targets Σ_k probs_k·[indices_k = j]; the label gradient is that of probs.

    An id outside the classes is padding.
    """
    logits, indices = np.asarray(logits, np.float64), np.asarray(indices)
    rows = np.moveaxis(logits, axis, -1)
    targets = np.zeros(rows.shape)
    for place in np.ndindex(indices.shape):
        if 0 <= indices[place] < rows.shape[-1]:
            targets[(*place[:-1], indices[place])] += np.asarray(probs, np.float64)[
                place
            ]
    targets = np.moveaxis(targets, -1, axis)
    loss = softmax_cross_entropy(logits, targets, axis, where, **options)
    dense = np.moveaxis(np.asarray(loss.label_gradient), axis, -1)
    inside = (indices >= 0) & (indices < rows.shape[-1])
    own = np.take_along_axis(dense, np.where(inside, indices, 0), -1)
    return loss._replace(label_gradient=np.where(inside, own, 0))


def softmax_kl_divergence(
    logits: Any,
    teacher_logits: Any,
    axis: int = -1,
    where: Any = None,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
) -> Loss:
    """Σ q·log(q / p) of the teacher's q and the student's p; reverse: of p and q."""
    keep = np.ones(np.shape(logits), bool)
    if where is not None:
        mask = np.asarray(where)
        keep &= mask if mask.ndim == keep.ndim else np.expand_dims(mask, axis)
    rows = keep.any(axis, keepdims=True)

    def log_softmax(values: Any) -> np.ndarray:
        values = np.where(keep, np.asarray(values, np.float64) / temperature, -np.inf)
        values = np.where(rows, values, 0)
        return values - _log_sum_exp(values, axis)

    log_p, log_q = log_softmax(logits), log_softmax(teacher_logits)
    first, second = (log_p, log_q) if direction == "reverse" else (log_q, log_p)
    mass = np.exp(first)
    with np.errstate(invalid="ignore"):
        change = np.where(mass == 0, 0, first - second)
    value = (mass * change).sum(axis)
    if direction == "reverse":
        slope = mass * (change - np.expand_dims(value, axis))
    else:
        slope = np.exp(log_p) - np.exp(log_q)
    gradient = np.where(keep & rows, slope, 0) / temperature
    return Loss(np.where(np.squeeze(rows, axis), value, 0), gradient)


def linearized_softmax_cross_entropy(
    logits: Any, labels: Any, axis: int | tuple[int, ...] = -1
) -> Loss:
    """The surrogate Σ_j g_j·x_j whose gradient g is that of the dense loss."""
    gradient = softmax_cross_entropy(logits, labels, axis).gradient
    terms = _times(gradient, np.asarray(logits, np.float64))
    axes = axis if isinstance(axis, tuple) else (axis,)
    return Loss(terms.sum(axis=axes), gradient)


def sigmoid_binary_cross_entropy(
    logits: Any,
    labels: Any,
    *,
    where: Any = None,
    pos_weight: Any = None,
    label_smoothing: float = 0.0,
) -> Loss:
    """pos_weight·y·softplus(−x) + (1 − y)·softplus(x), smoothed y = (1 − a)·y + a / 2.

    At x = ±inf the limits: 0 for the label that is certain, +inf for the other.
    """
    x = np.asarray(logits).astype(np.float64)
    y = (1 - label_smoothing) * np.asarray(labels).astype(np.float64)
    y = y + label_smoothing / 2
    weight = 1.0 if pos_weight is None else np.asarray(pos_weight).astype(np.float64)
    tail = np.exp(-np.abs(x))
    small, big = tail / (1 + tail), 1 / (1 + tail)
    positive, negative = weight * y, 1 - y
    softplus_down = np.maximum(-x, 0) + np.log1p(tail)
    softplus_up = np.maximum(x, 0) + np.log1p(tail)
    value = _times(positive, softplus_down) + _times(negative, softplus_up)
    gradient = negative * np.where(x >= 0, big, small)
    gradient = gradient - positive * np.where(x >= 0, small, big)
    gradient = np.where(np.isnan(x), np.nan, gradient)
    label_gradient = _times(weight, softplus_down) - softplus_up
    label_gradient = (1 - label_smoothing) * label_gradient
    if where is not None:
        value = np.where(where, value, 0.0)
        gradient = np.where(where, gradient, 0.0)
        label_gradient = np.where(where, label_gradient, 0.0)
    return Loss(value, gradient, label_gradient)


def nll_loss(
    log_probs: Any,
    labels: Any,
    axis: int | tuple[int, ...] = -1,
    where: Any = None,
    *,
    class_weights: Any = None,
) -> Loss:
    """−class_weights[y]·log_probs[y]; +inf where y names a dropped class."""
    rows, batch, restore = _class_rows(log_probs, axis)
    size = rows.shape[-1]
    keep = _kept(where, rows.shape, batch, axis)
    weights = _flat_weights(class_weights, size)
    values, gradients = [], []
    for x, y, kept in zip(rows, np.asarray(labels).reshape(-1), keep, strict=True):
        one_hot = np.arange(size) == int(y)
        if kept.any() and not one_hot.any():
            values.append(np.nan)
            gradients.append(np.where(kept, np.nan, 0.0))
            continue
        t = weights * one_hot * kept.any()
        values.append(_times(t, np.where(kept, -x, np.inf)).sum())
        gradients.append(np.where(kept, 0.0 - t, 0.0))
    return Loss(
        np.array(values).reshape(batch),
        restore(np.array(gradients).reshape(rows.shape)),
    )


def categorical_cross_entropy(
    probs: Any,
    labels: Any,
    axis: int | tuple[int, ...] = -1,
    where: Any = None,
    *,
    epsilon: float = 1e-7,
) -> np.ndarray:
    """−Σ_j y_j·log clip(p_j / Σp, epsilon, 1 − epsilon), the value alone."""
    rows, batch, _ = _class_rows(probs, axis)
    targets, _, _ = _class_rows(labels, axis)
    keep = _kept(where, rows.shape, batch, axis)
    values = []
    for p, y, kept in zip(rows, targets, keep, strict=True):
        kept_p, kept_y = p[kept], y[kept]
        with np.errstate(invalid="ignore"):
            share = kept_p / kept_p.sum()
        surprisal = -np.log(np.clip(share, epsilon, 1 - epsilon))
        values.append(_times(kept_y, surprisal).sum())
    return np.array(values).reshape(batch)


def binary_cross_entropy(
    probs: Any, labels: Any, where: Any = None, *, epsilon: float = 1e-7
) -> np.ndarray:
    """−y·log p − (1 − y)·log(1 − p), p clipped to [epsilon, 1 − epsilon]; the value."""
    p = np.clip(np.asarray(probs).astype(np.float64), epsilon, 1 - epsilon)
    y = np.asarray(labels).astype(np.float64)
    value = -_times(y, np.log(p)) - _times(1 - y, np.log1p(-p))
    return value if where is None else np.where(where, value, 0.0)


def weighted_mean(
    values: Any, weights: Any = None, where: Any = True, axis: Any = None
) -> np.ndarray:
    """Σ w·v / Σ w over the entries whose weight is not 0; 0 where Σ w = 0."""
    values = np.asarray(values).astype(np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights)
    weights = np.where(where, weights.astype(np.float64), 0)
    mass = weights.sum(axis)
    total = _times(weights, values).sum(axis)
    return np.where(mass == 0, 0, total / np.where(mass == 0, 1, mass))


class LinearLoss(NamedTuple):
    """The loss of a linear head, and the gradients of the sum of its results."""

    value: np.ndarray
    hidden: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    weights: np.ndarray
    class_weights: np.ndarray
    softcap: np.ndarray


def linear_softmax_cross_entropy(
    hidden: Any,
    kernel: Any,
    labels: Any,
    *,
    bias: Any = None,
    where: Any = None,
    weights: Any = None,
    class_mask: Any = None,
    reduction: str | None = None,
    label_smoothing: float = 0.0,
    class_weights: Any = None,
    z_loss: float = 0.0,
    softcap: Any = None,
) -> LinearLoss:
    """The integer-label loss of capped logits, times row weights; sum or mean.

    The mean is Σ w·loss / Σ w·class_weights[label] over the kept rows, 0 when nothing
    is kept. A row of weight 0 that is not finite, or names no class, is dropped.
    """
    head = _linear_head(
        hidden, kernel, labels, bias, where, weights, class_mask, softcap
    )
    classes = head.logits.shape[1]
    of_class = _flat_weights(class_weights, classes)
    loss = softmax_cross_entropy_with_integer_labels(
        head.logits,
        head.ids,
        where=head.kept,
        label_smoothing=label_smoothing,
        class_weights=of_class,
        z_loss=z_loss,
    )
    surprise = softmax_cross_entropy(
        head.logits, np.zeros(head.logits.shape), where=head.kept
    ).label_gradient
    hit = (np.arange(classes) == head.ids[:, None]) & head.kept.any(1)[:, None]
    share = head.kept / np.maximum(head.kept.sum(1, keepdims=True), 1)
    target = (1 - label_smoothing) * hit + label_smoothing * share
    of_row = head.weights[:, None]
    by_class = _times(of_row * target, surprise).sum(0)
    value = _times(head.weights, loss.value)
    slope, by_row = _times(of_row, loss.gradient), loss.value
    value = value.reshape(np.shape(labels)) if reduction is None else value.sum()
    if reduction == "mean":
        mass = (of_row * hit * of_class).sum()
        scale = 0.0 if mass == 0 else 1 / mass
        value = value * scale if mass else 0.0
        by_row = _times(scale, by_row - (hit * of_class).sum(1) * value)
        by_class = _times(scale, by_class - (of_row * hit).sum(0) * value)
        slope = _times(scale, slope)
    return LinearLoss(
        np.asarray(value),
        *_pulled_back(head, slope, np.shape(hidden)),
        weights=by_row.reshape(np.shape(labels)),
        class_weights=by_class,
        softcap=_times(slope, head.cap_slope).sum(),
    )


class LinearStatistics(NamedTuple):
    """What a head's statistics are, and gradients of their weighted sum."""

    log_prob: np.ndarray
    log_normalizer: np.ndarray
    entropy: np.ndarray
    prediction: np.ndarray
    hidden: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray


def linear_softmax_statistics(
    hidden: Any,
    kernel: Any,
    labels: Any,
    *,
    bias: Any = None,
    where: Any = None,
    class_mask: Any = None,
    softcap: Any = None,
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> LinearStatistics:
    """Log-probability, log-normalizer, entropy, arg max; `factors` of the first three.

    The arg max is the first of the largest, −1 where none is kept or finite.
    """
    head = _linear_head(hidden, kernel, labels, bias, where, None, class_mask, softcap)
    kept, logits = head.kept, head.logits
    alive = kept.any(1)
    values = np.where(kept, logits, -np.inf)
    top = np.where(alive, values.max(1), 0.0)
    power = np.exp(values - top[:, None])
    # The 1 of one largest logit is left out, as in `_softmax_row`.
    first = values.argmax(1)[:, None] == np.arange(values.shape[1])
    log_mass = np.where(alive, np.log1p(np.where(first, 0.0, power).sum(1)), 0.0)
    p = np.where(kept, power * np.exp(-log_mass)[:, None], 0.0)
    log_p = np.where(kept, values - top[:, None] - log_mass[:, None], 0.0)
    entropy = _times(p, -log_p).sum(1)
    hit = (np.arange(values.shape[1]) == head.ids[:, None]) & alive[:, None]
    log_prob = np.where(hit & ~kept, -np.inf, _times(hit, log_p)).sum(1)
    by_prob, by_normalizer, by_entropy = factors
    slope = by_prob * (hit - p) + by_normalizer * p
    slope = slope - by_entropy * _times(p, log_p + entropy[:, None])
    shape = np.shape(labels)
    finite = alive & np.isfinite(values.max(1))
    return LinearStatistics(
        log_prob.reshape(shape),
        np.where(alive, top + log_mass, 0.0).reshape(shape),
        entropy.reshape(shape),
        np.where(finite, values.argmax(1), -1).reshape(shape),
        *_pulled_back(head, np.where(kept, slope, 0.0), np.shape(hidden)),
    )


class _LinearHead(NamedTuple):
    """N rows of a linear head, in float64."""

    hidden: np.ndarray  # [N, D], 0 in a dropped row
    kernel: np.ndarray  # [D, V], 0 in a dropped class
    ids: np.ndarray  # [N]
    weights: np.ndarray  # [N]
    kept: np.ndarray  # [N, V]
    logits: np.ndarray  # [N, V]
    slope: np.ndarray  # of the cap, by what it caps
    cap_slope: np.ndarray  # of the logits, by the cap


def _linear_head(
    hidden: Any,
    kernel: Any,
    labels: Any,
    bias: Any,
    where: Any,
    weights: Any,
    class_mask: Any,
    softcap: Any,
) -> _LinearHead:
    kernel = np.asarray(kernel).astype(np.float64)
    features, classes = kernel.shape
    ids = np.asarray(labels).reshape(-1)
    count = ids.size
    hidden = np.asarray(hidden).astype(np.float64).reshape(count, features)
    rows = np.ones(count, bool) if where is None else np.asarray(where).reshape(-1)
    if weights is None:
        weights = np.ones(count)
    weights = np.asarray(weights).astype(np.float64).reshape(-1)
    broken = ~np.isfinite(hidden).all(1) | (ids < 0) | (ids >= classes)
    rows = rows & ~((weights == 0) & broken)
    columns = np.ones(classes, bool) if class_mask is None else np.asarray(class_mask)
    hidden = np.where(rows[:, None], hidden, 0.0)
    kernel = np.where(columns, kernel, 0.0)
    offset = np.zeros(classes) if bias is None else np.asarray(bias).astype(np.float64)
    linear = hidden @ kernel + np.where(columns, offset, 0.0)
    kept = rows[:, None] & columns
    slope, cap_slope = np.ones(linear.shape), np.zeros(linear.shape)
    logits = linear
    if softcap is not None:
        cap = np.float64(softcap)
        bent = np.tanh(linear / cap)
        slope = 1 - bent**2
        cap_slope = bent - _times(slope, linear / cap)
        logits = cap * bent
    return _LinearHead(hidden, kernel, ids, weights, kept, logits, slope, cap_slope)


def _pulled_back(
    head: _LinearHead, by_logits: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the gradients by hidden, kernel and bias from those by the logits."""
    by_linear = _times(by_logits, head.slope)
    by_hidden = by_linear @ head.kernel.T
    return by_hidden.reshape(shape), head.hidden.T @ by_linear, by_linear.sum(0)


def softmax(logits: Any) -> np.ndarray:
    """Softmax over the last axis."""
    x = np.asarray(logits).astype(np.float64)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sinkhorn_targets(
    scores: Any,
    *,
    epsilon: float = 0.05,
    num_iters: int = 3,
    where: Any = None,
    prior: Any = None,
) -> np.ndarray:
    """exp(scores/ε), its columns and then its rows normalized, on logarithms."""
    scores = np.asarray(scores).astype(np.float64)
    keep = np.ones(len(scores), bool) if where is None else np.asarray(where)
    log_targets = scores[keep] / float(epsilon)
    size = scores.shape[1]
    prior = np.ones(size) if prior is None else np.asarray(prior).astype(np.float64)
    share = np.log(len(log_targets) * prior / prior.sum())
    for _ in range(num_iters):
        log_targets = log_targets + (share - _log_sum_exp(log_targets, 0))
        log_targets = log_targets - _log_sum_exp(log_targets, 1)
    targets = np.zeros(scores.shape)
    targets[keep] = np.exp(log_targets)
    return targets


def _log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    top = values.max(axis, keepdims=True)
    return top + np.log(np.exp(values - top).sum(axis, keepdims=True))


def sinkhorn_cross_entropy(
    logits: Any, scores: Any, *, temperature: float = 1.0, **options: Any
) -> Loss:
    """The loss of dense targets, which are constants; dropped rows are 0."""
    targets = sinkhorn_targets(scores, **options)
    keep = options.get("where")
    keep = np.ones(len(targets), bool) if keep is None else np.asarray(keep)
    logits = np.where(keep[:, None], np.asarray(logits).astype(np.float64), 0)
    loss = softmax_cross_entropy(logits / float(temperature), targets, where=keep)
    return Loss(loss.value, loss.gradient / float(temperature))


def exact_softmax_cross_entropy(
    logits: Any, targets: Any, *, z_loss: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient of rows [N, V] of finite logits, as 50-digit mpmath numbers.

    `targets` are class ids [N] or target mass [N, V].
    """
    import mpmath

    targets = np.asarray(targets)
    if targets.ndim == 1:
        targets = np.eye(np.shape(logits)[1])[targets]
    values, gradients = [], []
    for row, target in zip(np.asarray(logits), targets, strict=True):
        # Digits beyond the smallest term: the 1 of a confident row stays apart.
        with mpmath.workdps(50 + int((max(row) - min(row)) / 2)):
            x = [mpmath.mpf(float(v)) for v in row]
            t = [mpmath.mpf(float(v)) for v in target]
            powers = [mpmath.exp(v - max(x)) for v in x]
            normalizer = mpmath.fsum(powers)
            lse = max(x) + mpmath.log(normalizer)
            loss = mpmath.fsum(a * (lse - b) for a, b in zip(t, x, strict=True))
            values.append(loss + z_loss * lse**2)
            slope = mpmath.fsum(t) + 2 * z_loss * lse
            gradients.append(
                [slope * e / normalizer - a for a, e in zip(t, powers, strict=True)]
            )
    return np.array(values, object), np.array(gradients, object)


def exact_loss_of_a_row(
    logits: Any,
    keep: Any,
    label: int,
    *,
    label_smoothing: float = 0.0,
    class_weights: Any = None,
    z_loss: float = 0.0,
) -> Any:
    """The loss of one class id in mpmath, to the digits of its context."""
    import mpmath

    kept = [index for index in range(len(logits)) if keep[index]]
    weights = _flat_weights(class_weights, len(logits))
    normalizer = mpmath.log(mpmath.fsum(mpmath.exp(logits[i]) for i in kept))
    smoothing = mpmath.mpf(label_smoothing)
    loss = z_loss * normalizer**2
    for index in kept:
        target = smoothing / len(kept) + (1 - smoothing) * (index == label)
        loss += float(weights[index]) * target * (normalizer - logits[index])
    return loss


def exact_sigmoid_binary_cross_entropy(
    logits: Any, labels: Any, *, pos_weight: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient elementwise for finite logits, as 50-digit mpmath numbers."""
    import mpmath

    values, gradients = [], []
    for logit, label in zip(np.ravel(logits), np.ravel(labels), strict=True):
        with mpmath.workdps(50 + int(abs(logit) / 2)):
            x, y = mpmath.mpf(float(logit)), mpmath.mpf(float(label))
            positive = pos_weight * y
            up, down = mpmath.exp(x), mpmath.exp(-x)
            values.append(
                positive * mpmath.log(1 + down) + (1 - y) * mpmath.log(1 + up)
            )
            gradients.append((1 - y) / (1 + down) - positive / (1 + up))
    shape = np.shape(logits)
    return (
        np.array(values, object).reshape(shape),
        np.array(gradients, object).reshape(shape),
    )


def _class_rows(array: Any, axis: int | tuple[int, ...]) -> tuple:
    """Returns rows [N, V] in float64, the batch's shape, and the way back."""
    array = np.asarray(array).astype(np.float64)
    axes = axis if isinstance(axis, tuple) else (axis,)
    last = tuple(range(-len(axes), 0))
    moved = np.moveaxis(array, axes, last)
    batch = moved.shape[: moved.ndim - len(axes)]

    def restore(rows: np.ndarray) -> np.ndarray:
        return np.moveaxis(rows.reshape(moved.shape), last, axes)

    size = int(np.prod(moved.shape[moved.ndim - len(axes) :]))
    return moved.reshape(int(np.prod(batch)), size), batch, restore


def _kept(
    where: Any, shape: tuple[int, int], batch: tuple, axis: int | tuple
) -> np.ndarray:
    """Returns which classes of which rows count, bool[N, V]."""
    if where is None:
        return np.ones(shape, bool)
    where = np.asarray(where)
    if where.shape == batch:
        return np.repeat(where.reshape(-1, 1), shape[1], axis=1)
    rows, _, _ = _class_rows(where, axis)
    return rows != 0


def _flat_weights(class_weights: Any, size: int) -> np.ndarray:
    """Returns the class weights as float64[V], ones when there are none."""
    if class_weights is None:
        return np.ones(size)
    return np.asarray(class_weights).astype(np.float64).reshape(size)


def _times(factor: Any, values: np.ndarray) -> np.ndarray:
    """Returns factor·values, 0 where the factor is 0 whatever the value is."""
    factor = np.broadcast_to(factor, np.shape(values))
    return np.where(factor == 0, 0.0, factor * np.where(factor == 0, 0.0, values))


def _softmax_row(
    x: np.ndarray, t: np.ndarray, kept: np.ndarray, z_loss: float, lost: float = 0.0
) -> tuple[float, np.ndarray, np.ndarray]:
    """Returns loss, gradient by x and −log p of one row; `lost` is mass off the row."""
    gradient, surprisal = np.zeros(x.size), np.zeros(x.size)
    if not kept.any():
        return 0.0, gradient, surprisal
    x, t = x[kept], t[kept]
    if np.isnan(x).any() or x.max() == np.inf or x.max() == -np.inf:
        gradient[kept] = surprisal[kept] = np.nan
        return np.nan, gradient, surprisal
    top = int(np.argmax(x))
    e = np.exp(x - x[top])
    rest = np.delete(e, top).sum()
    p = e / (1 + rest)
    complement = 1 - p
    complement[top] = rest / (1 + rest)
    nll = (x[top] - x) + np.log1p(rest)
    # The mass on the other classes, summed and not subtracted from the whole.
    before = np.concatenate([[0.0], np.cumsum(t)[:-1]])
    after = np.concatenate([np.cumsum(t[::-1])[::-1][1:], [0.0]])
    others = before + after + lost
    lse = x[top] + np.log1p(rest)
    loss = _times(t, nll).sum() + z_loss * lse**2
    if lost != 0:
        loss = loss + lost * np.inf
    gradient[kept] = others * p - t * complement + 2 * z_loss * lse * p
    surprisal[kept] = nll
    return float(loss), gradient, surprisal
