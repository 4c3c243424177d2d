"""Routing: who is sent what, into which slot."""
