"""What the compilers make of the losses, on machines that have no TPU and no GPU."""
