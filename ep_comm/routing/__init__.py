"""Who is sent what, into which slot."""
