"""Virtual machines: the second isolation of the engine. Each sandbox is a machine with a kernel of its own, run from the same images."""
