"""What a wire tap writes and an adversary reads."""
