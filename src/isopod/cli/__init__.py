"""The command line: one grammar as data, a lean client for the everyday verbs."""
