"""The arguments of linear heads by their axes: the table that meshes read.

`n` stands for the batch axes, `v` for the classes, `d` for features and `k` for the ids
of a row; a number has none. An argument that is absent, or is a number where a row a
number may be given, is not sharded.
"""

HEAD_AXES = {
    "hidden": "nd",
    "kernel": "dv",
    "labels": "nk",
    "label_probs": "nk",
    "where": "n",
    "weights": "n",
    "temperature": "n",
    "bias": "v",
    "class_mask": "v",
    "class_weights": "v",
    "label_smoothing": "",
    "z_loss": "",
    "softcap": "",
    "teacher_hidden": "nd",
    "teacher_kernel": "dv",
    "teacher_bias": "v",
    "teacher_softcap": "",
}
