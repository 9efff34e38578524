"""The roofline model: operations of graphs, the machine's ceilings, and measured times between the two."""
