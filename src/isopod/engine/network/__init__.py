"""Networks of one node: address ranges, the file of networks, the packet filter, prepared namespaces, and the facade `Networks`."""
