"""What runs while the parties talk: the parties, the tap on their wires, the instruments."""
