"""From a torch module to checked ONNX graphs and the denoiser's stages."""
