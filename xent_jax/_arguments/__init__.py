"""Arguments of a call: read, checked, and brought to one layout and one place."""
