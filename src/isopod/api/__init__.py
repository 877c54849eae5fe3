"""The one contract: messages, methods, the client, and how answers are shown."""
