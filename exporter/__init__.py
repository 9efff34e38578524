"""From a model to a bundle: ONNX graphs that are compared with torch, and compiled engines.

It needs the extra ``export``. Importing this package imports nothing else. :func:`latentrt.exporter.build.build_bundle`
does the work of ``latentrt build-engine``.

Rooms, from the ground up; a module imports only from rooms that stand earlier in this list:

- ``components``: a component to export, and the interfaces ``Checkpoint`` and ``Adapter``; ``progress``: reports.
- ``passes/``: rewriting of graphs. ``graphs/``: from a torch module to ONNX graphs, whole and in stages.
- ``families/``: the components of each family of models.
- ``source/``: reading a model without trusting it.
- ``model``: a source with its adapters.
- ``adapters/``: LoRA, ControlNet, IP-Adapter, safety checker and tiny VAE.
- ``verification/``: comparing graphs with torch. ``precision/``: reduced precision and its gates.
- ``builder/``: writing bundles. ``cli/``: the commands.

``build``, ``targets``, ``quality`` and ``emulate`` are names that other packages import; what they name has moved into
the rooms.
"""
