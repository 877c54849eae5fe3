"""Drivers: one file for each virtual machine monitor, and what chooses between them (`registry`)."""
