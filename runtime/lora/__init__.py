"""LoRA files: reading them, and the names of their tensors."""
