"""Weights that go into a model or beside it: LoRA, ControlNet, IP-Adapter, safety checker, tiny VAE."""
