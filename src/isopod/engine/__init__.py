"""The engine: containers, images and networks of one machine."""
