"""Telemetry: how metrics leave a node: expositions and their exporters, the collectors of system figures, health, and the dashboard."""
