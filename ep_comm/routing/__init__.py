"""Routing: who is sent what, into which slot; and captured routing in files."""
