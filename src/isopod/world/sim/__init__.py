"""The simulated World: one thread, virtual time, memory instead of kernel and disk."""
