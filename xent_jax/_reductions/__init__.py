"""Reductions over the classes: on one device, over mesh axes, as XLA does them well."""
