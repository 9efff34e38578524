"""What goes beside or into a model: LoRA, ControlNet, IP-Adapter, safety checker, tiny VAE."""
