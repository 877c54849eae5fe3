"""The cluster: Raft, its members, and what they hold in common."""
