"""A student as others load it: the folder of a pipeline of diffusers, a LoRA for ComfyUI, a model card."""
