"""Latents to weights: the semantic and the detail expert, their loop, engines, checkpoints and launch."""
