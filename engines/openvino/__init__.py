"""OpenVINO on CPUs: the engine, the cache of compiled models, and rewrites of a model before it is compiled."""
