"""Tools beside training: the demo, published results."""
