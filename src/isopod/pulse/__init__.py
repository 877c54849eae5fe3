"""Pulse: the metrics agent for sandboxes, a drop-in for kata-monitor (docs/pulse.md)."""
