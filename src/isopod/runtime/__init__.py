"""The runtime under every service: gates, phased shutdown, task groups, configuration, metrics and the logger."""
