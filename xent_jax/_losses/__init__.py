"""The public functions, a module a family."""
