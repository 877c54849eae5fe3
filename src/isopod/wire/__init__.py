"""Codecs, frames and verb tables: protocol as data and pure functions, without any I/O."""
