"""What the losses are held to: closed forms in float64, and inputs that stress them."""
