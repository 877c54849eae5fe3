"""Networking above the World's connections: RPC now, HTTP later."""
