"""Export a torch module to checked ONNX graphs, and split a denoiser into stages."""
