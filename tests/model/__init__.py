"""Puppets that perform memory operations, and a model that knows what their memory must contain."""
