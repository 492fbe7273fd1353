"""Rows of the porting guide for the trainers that people come from.

They are not installed where the tests run, so each row has the formula that its library
computes, as read in its source, and is compared with that in float64.
"""

from porting_rows import IDS, Row, Table

# Not run, so nothing is imported and the arrays are NumPy's.
_NOT_RUN = ("", "", "formula", "…", "…")

# Both put `s` on the other classes together and subtract what is left at the optimum.
_SMOOTHED = (
    f"{IDS}(x, y, label_smoothing=0.1 * 5 / 4) + "
    "(0.9 * np.log(0.9) + 0.1 * np.log(0.1 / 4))"
)
_OF_SMOOTHED = "smoothed_loss(x, y, 0.1) - entropy(np.array([0.9] + 4 * [0.1 / 4]))"

T5X = Table(
    "t5x-calls",
    *_NOT_RUN,
    (
        Row(
            "losses.compute_weighted_cross_entropy(x, y)[0]",
            f"{IDS}(x, y).sum()",
            "a sum, unless it is given a `loss_normalizing_factor`",
            formula="loss_of(x, y).sum()",
        ),
        Row(
            "losses.compute_weighted_cross_entropy(x, y, weights=s, "
            "loss_normalizing_factor=s.sum())[0]",
            f"weighted_mean({IDS}(x, y), s)",
            formula="(s * loss_of(x, y)).sum() / s.sum()",
        ),
        Row(
            "losses.compute_weighted_cross_entropy(x, y, label_smoothing=0.1)[0]",
            f"({_SMOOTHED}).sum()",
            "smoothing s gives s/(V − 1) to each other class there, s/V to every class "
            "here: s·V/(V − 1) is the same. The entropy of those targets, a constant, "
            "is subtracted there",
            formula=f"({_OF_SMOOTHED}).sum()",
        ),
        Row(
            "losses.compute_weighted_cross_entropy(x, y, z_loss=0.01)[0]",
            f"{IDS}(x, y, z_loss=0.01).sum()",
            formula="(loss_of(x, y) + 0.01 * lse(x) ** 2).sum()",
        ),
        Row(
            "losses.compute_weighted_cross_entropy(x, y, z_loss=0.01)[1]",
            "0.01 * (softmax_statistics(x, y).log_normalizer ** 2).sum()",
            "the z-loss alone, to log; it has gradient 0 there",
            formula="0.01 * (lse(x) ** 2).sum()",
        ),
    ),
)

MAXTEXT = Table(
    "maxtext-calls",
    *_NOT_RUN,
    (
        Row(
            "max_utils.cross_entropy_with_logits(x, jax.nn.one_hot(y, 5), 0.01)[0]",
            f"{IDS}(x, y, z_loss=0.01)",
            "no one-hot array; the z-loss is in the loss in both",
            formula="loss_of(x, y) + 0.01 * lse(x) ** 2",
        ),
        Row(
            "xent_sum / (total_weights + EPS)",
            "weighted_mean(loss, where=keep)",
            "of `train.py`, where `targets_segmentation` is the mask",
            formula="loss_of(x, padded)[padded != -100].mean()",
        ),
        Row(
            "num_vocab_tiling=4",
            'linear_softmax_cross_entropy(h, k, padded, where=keep, reduction="mean")',
            "blocks of rows in both; their number has to divide the batch there, and "
            "the forward pass is made again for the gradient",
            formula="loss_of(h @ k, padded)[padded != -100].mean()",
        ),
    ),
)

AXLEARN = Table(
    "axlearn-calls",
    *_NOT_RUN,
    (
        Row(
            "cross_entropy(x, padded)[0]",
            "weighted_mean(loss, where=keep)",
            "ids that are no class are dropped unasked there; here they are `nan` "
            "unless `where` drops them",
            formula="loss_of(x, padded).sum() / max(np.sum(padded >= 0), 1)",
        ),
        Row(
            "cross_entropy(x, y, live_targets=s)[0]",
            f"(s * {IDS}(x, y)).sum() / jnp.maximum(s.sum(), 1)",
            "the denominator is at least 1 there; `weighted_mean` divides by the sum "
            "of the weights, however small",
            formula="(s * loss_of(x, y)).sum() / max(s.sum(), 1)",
        ),
        Row(
            "cross_entropy(x, y, label_smoothing=0.1, z_loss_scale=0.01)[0]",
            f"{IDS}(x, y, label_smoothing=0.1, z_loss=0.01).mean()",
            formula="(0.9 * loss_of(x, y) + 0.1 * (lse(x) - x.mean(-1)) "
            "+ 0.01 * lse(x) ** 2).mean()",
        ),
        Row(
            'cross_entropy(x, y, z_loss_scale=0.01)[1]["z_loss"]',
            "(softmax_statistics(x, y).log_normalizer ** 2).mean()",
            "reported without its coefficient",
            formula="(lse(x) ** 2).mean()",
        ),
        Row(
            "cross_entropy(x, y, soft_target_labels=p)[0]",
            "softmax_cross_entropy(x, p).mean()",
            formula="loss_of_targets(x, p).mean()",
        ),
    ),
)

LEVANTER = Table(
    "levanter-calls",
    *_NOT_RUN,
    (
        Row(
            "fused_cross_entropy_loss_and_logsumexp_penalty(h, y, k, weight=s)",
            'linear_softmax_cross_entropy(h, k, y, weights=s, reduction="mean")',
            "the kernel comes last there; both divide by the sum of the weights",
            formula="(s * loss_of(h @ k, y)).sum() / s.sum()",
        ),
        Row(
            "fused_cross_entropy_loss_and_logsumexp_penalty(h, y, k, "
            "logsumexp_weight=0.01, logit_soft_cap=2.0)",
            "linear_softmax_cross_entropy(h, k, y, z_loss=0.01, softcap=2.0, "
            'reduction="mean")',
            formula="(loss_of(2 * np.tanh(h @ k / 2), y) "
            "+ 0.01 * lse(2 * np.tanh(h @ k / 2)) ** 2).mean()",
        ),
        Row(
            "maybe_fused_next_token_loss(Pos, Embed, Vocab, h, k, y)",
            'linear_softmax_cross_entropy(h[:-1], k, y[1:], reduction="mean")',
            "shifts the labels by one and leaves the last row out; here you do",
            formula="loss_of(h @ k, np.roll(y, -1))[:-1].mean()",
        ),
    ),
)

TUNIX = Table(
    "tunix-calls",
    *_NOT_RUN,
    (
        Row(
            "selective_log_softmax(x, y)",
            "softmax_statistics(x, y).log_prob",
            formula="-loss_of(x, y)",
        ),
        Row(
            "compute_per_token_logps(…, temperature=0.7)",
            "linear_softmax_statistics(h, k, y, temperature=0.7).log_prob",
            "of features and kernel, without logits",
            formula="-loss_of(h @ k / 0.7, y)",
        ),
        Row(
            "compute_per_token_logps(…, temperature=0.7, return_entropy=True)[1]",
            "linear_softmax_statistics(h, k, y, temperature=0.7).entropy",
            "from the same pass",
            formula="entropy(np.exp(h @ k / 0.7 - lse(h @ k / 0.7)[:, None]))",
        ),
        Row(
            'compute_kl_divergence(log_prob, reference, "kl")',
            "softmax_statistics(x, y).log_prob - softmax_statistics(2 * x, y).log_prob",
            "an estimate from the tokens that were drawn (here of logits x, the "
            'reference 2·x); `softmax_kl_divergence(x, 2 * x, direction="reverse")` is '
            "the divergence itself",
            formula="loss_of(2 * x, y) - loss_of(x, y)",
        ),
    ),
)

EASYDEL = Table(
    "easydel-calls",
    *_NOT_RUN,
    (
        Row(
            "sparse_cross_entropy_chunked_vocab(x, padded)[0]",
            "weighted_mean(loss, where=keep)",
            "−100 is ignored unasked there",
            formula="loss_of(x, padded)[padded != -100].mean()",
        ),
        Row(
            "cross_entropy_blockwise_logits(x, y, label_smoothing=0.1)[0]",
            f"({_SMOOTHED}).sum()",
            "a sum; smoothing as T5X has it, less the same constant",
            formula=f"({_OF_SMOOTHED}).sum()",
        ),
        Row(
            "cross_entropy_blockwise_logits(x, y, weights=s, z_loss=0.01)[1]",
            "0.01 * (s * softmax_statistics(x, y).log_normalizer ** 2).sum()",
            "the z-loss, reported beside a loss that has it already",
            formula="0.01 * (s * lse(x) ** 2).sum()",
        ),
    ),
)

BIG_VISION = Table(
    "big-vision-calls",
    *_NOT_RUN,
    (
        Row(
            "u.softmax_xent(logits=x, labels=p)",
            "softmax_cross_entropy(x, p).mean()",
            formula="loss_of_targets(x, p).mean()",
        ),
        Row(
            "u.softmax_xent(logits=x, labels=p, kl=True)",
            "softmax_kl_divergence(x, jnp.log(p)).mean()",
            "the entropy of the targets is subtracted",
            formula="(loss_of_targets(x, p) - entropy(p)).mean()",
        ),
        Row(
            "u.sigmoid_xent(logits=x, labels=b)",
            "sigmoid_binary_cross_entropy(x, b).sum(-1).mean()",
            "the sum over the classes there, a loss an element here",
            formula="(np.log1p(np.exp(x)) - b * x).sum(-1).mean()",
        ),
        Row(
            "u.weighted_softmax_xent(logits=x[None], labels=y[None], "
            "weights=s[None], label_smoothing=0.1)",
            f"weighted_mean({IDS}(x, y, label_smoothing=0.1 * 5 / 4), s)",
            "smoothing over the other classes, and no constant subtracted; the mean of "
            "the sentences' weighted means, here of one (`axis=-1` for several)",
            formula="(s * smoothed_loss(x, y, 0.1)).sum() / s.sum()",
        ),
        Row(
            "u.bidirectional_contrastive_loss(h, h[::-1], 3.0, reduction=True)[0]",
            "(linear_softmax_cross_entropy(3 * h, h[::-1].T, jnp.arange(6)) + "
            "linear_softmax_cross_entropy(3 * h[::-1], h.T, jnp.arange(6))).mean() / 2",
            "without the N × N logits",
            formula="(lse(3 * h @ h[::-1].T) + lse(3 * h[::-1] @ h.T) "
            "- 6 * (h * h[::-1]).sum(-1)).mean() / 2",
        ),
    ),
)

RLAX = Table(
    "rlax-calls",
    *_NOT_RUN,
    (
        Row(
            "rlax.policy_gradient_loss(x, y, e[:, 0], s)",
            f"(s * e[:, 0] * {IDS}(x, y)).mean()",
            "with a head, `weights` of either sign and one call",
            formula="(s * e[:, 0] * loss_of(x, y)).mean()",
        ),
        Row(
            "rlax.entropy_loss(x, s)",
            "-(s * softmax_statistics(x, y).entropy).mean()",
            "no function for it here: one of the statistics, of any ids y",
            formula="-(s * entropy(np.exp(x - lse(x)[:, None]))).mean()",
        ),
    ),
)

LIGER_WEIGHTS = Table(
    "head-liger-weights",
    *_NOT_RUN,
    (
        Row(
            "liger_fused_linear_cross_entropy(h, k.T, y, ce_weight=w, "
            "lse_square_scale=0.01)",
            "linear_softmax_cross_entropy(h, k, y, class_weights=w, "
            'reduction="mean") + 0.01 * '
            "(linear_softmax_statistics(h, k, y).log_normalizer ** 2).mean()",
            "the loss is divided by the labels' class weights and the z-loss by the "
            "number of rows there; `z_loss=0.01` would divide both by the weights",
            formula="(w[y] * loss_of(h @ k, y)).sum() / w[y].sum() "
            "+ 0.01 * (lse(h @ k) ** 2).mean()",
        ),
    ),
)

TRAINERS = (T5X, MAXTEXT, AXLEARN, LEVANTER, TUNIX, EASYDEL, BIG_VISION, RLAX)
