"""Raft: the core without I/O, the driver that gives it a disk and peers, snapshots, and what carries its messages."""
