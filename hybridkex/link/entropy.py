"""Shannon's binary entropy."""

import math

from hybridkex.link.ranges import finite


def binary_entropy(probability: float) -> float:
    """h(p) in bits; 0 outside the open interval (0, 1). Raises ``ConfigError``."""
    probability = finite("probability", probability)
    if not 0.0 < probability < 1.0:
        return 0.0
    q = 1.0 - probability
    return -probability * math.log2(probability) - q * math.log2(q)
