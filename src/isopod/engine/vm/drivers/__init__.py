"""Drivers: one file for each virtual machine monitor, and those beside QEMU together (`registry`)."""
