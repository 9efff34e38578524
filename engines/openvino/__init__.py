"""OpenVINO: engine, cache of compiled models, rewrites of a model before it is compiled."""
