"""Kinds of target: what a row of logits is compared with, in the same few verbs."""
