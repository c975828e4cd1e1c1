"""What every networked part shares: addresses, HTTP, the supervision of accepted connections."""
