"""Code shared by all networked packages: addresses, HTTP, supervision of accepted connections."""
