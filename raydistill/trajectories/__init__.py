"""Which latents train which step, and their way to the workers."""
