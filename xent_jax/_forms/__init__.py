"""Forms of computing: how logits come, at once, or in blocks of rows or of classes."""
