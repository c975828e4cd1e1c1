"""Parameter sets of the literature, by name.

Where a paper optimises its intensities for every distance, one sensible choice is kept here;
:mod:`hybridkex.link.optimise` finds the best for a distance.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Final

from hybridkex.errors import ConfigError
from hybridkex.link.finite_key import Security
from hybridkex.link.physics import Channel, PairSource, Transmitter
from hybridkex.link.ranges import check_ranges, instance

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Everything that describes a link except its length.

    Raises:
        ConfigError: a field has the wrong type or is out of range.
    """

    name: str
    """The word that :func:`preset` takes."""
    reference: str
    """The paper."""
    channel: Channel
    """The fibre and the detectors."""
    transmitter: Transmitter | PairSource
    """Alice's source of light."""
    security: Security
    """The failure probabilities that the proof may add up."""
    efficiency: float
    """f, as the paper assumes for error correction; only closed forms use it."""

    def __post_init__(self) -> None:
        instance("name", self.name, str)
        instance("reference", self.reference, str)
        instance("channel", self.channel, Channel)
        instance("transmitter", self.transmitter, Transmitter, PairSource)
        instance("security", self.security, Security)
        check_ranges(self, efficiency=(1.0, 100.0))

    @property
    def parameters(self) -> dict[str, object]:
        """The numbers of the preset, without its name and its reference."""
        parts = (self.channel, self.transmitter, self.security)
        flat = {one.name: getattr(part, one.name) for part in parts for one in fields(part)}
        return {**flat, "efficiency": self.efficiency}

    def at(self, distance_km: float) -> "Preset":
        """A copy with another length of fibre, ``distance_km``."""
        return replace(self, channel=self.channel.at(distance_km))


_ALL = (
    Preset(
        name="gys2005",
        reference=(
            "Gobby, Yuan, Shields, APL 84, 3762 (2004), with the decoys of Ma, Qi, Zhao, Lo,"
            " PRA 72, 012326 (2005)"
        ),
        channel=Channel(
            attenuation_db_per_km=0.21,
            receiver_efficiency=0.045,
            dark_count_probability=0.85e-6,
            misalignment=0.033,
            repetition_rate_hz=2e6,
        ),
        transmitter=Transmitter(
            intensities=(0.48, 0.05, 0.0),
            probabilities=(0.7, 0.2, 0.1),
            key_basis_probability=0.5,
        ),
        security=Security(),
        efficiency=1.22,
    ),
    Preset(
        name="lim2014",
        reference="Lim, Curty, Walenta, Xu, Zbinden, PRA 89, 022307 (2014)",
        channel=Channel(
            receiver_efficiency=0.1,
            dark_count_probability=6e-7,
            misalignment=5e-3,
            afterpulse_probability=4e-2,
            repetition_rate_hz=1e9,
        ),
        transmitter=Transmitter(
            intensities=(0.5, 0.2, 2e-4),
            probabilities=(0.5, 0.35, 0.15),
            key_basis_probability=0.8,
        ),
        security=Security(),
        efficiency=1.16,
    ),
    Preset(
        name="rusca2018",
        reference="Rusca, Boaron, Grünenfelder, Martin, Zbinden, APL 112, 171104 (2018)",
        channel=Channel(
            receiver_efficiency=0.2,
            dark_count_probability=1e-8,
            misalignment=0.01,
            repetition_rate_hz=1e9,
        ),
        transmitter=Transmitter(
            intensities=(0.5, 0.2), probabilities=(0.7, 0.3), key_basis_probability=0.9
        ),
        security=Security(),
        efficiency=1.16,
    ),
    Preset(
        name="boaron2018",
        # Clock, fibre and number of decoys are the experiment's; the detectors are typical values
        # for cooled superconducting ones, so this is "in the style of", not a reproduction.
        reference="in the style of Boaron et al., PRL 121, 190502 (2018): 2.5 GHz, one decoy",
        channel=Channel(
            attenuation_db_per_km=0.171,
            receiver_efficiency=0.4,
            dark_count_probability=1e-10,
            misalignment=0.01,
            dead_time_s=30e-9,
            repetition_rate_hz=2.5e9,
        ),
        transmitter=Transmitter(
            intensities=(0.45, 0.17), probabilities=(0.7, 0.3), key_basis_probability=0.9
        ),
        security=Security(),
        efficiency=1.06,
    ),
    Preset(
        name="bbm92",
        # Detectors and clock are lim2014's, without after-pulses, so that the two can be compared.
        reference=(
            "entangled pairs: Bennett, Brassard, Mermin, PRL 68, 557 (1992), with the source of"
            " Ma, Fung, Lo, PRA 76, 012307 (2007) in Alice's laboratory"
        ),
        channel=Channel(
            receiver_efficiency=0.1,
            dark_count_probability=6e-7,
            misalignment=5e-3,
            repetition_rate_hz=1e9,
        ),
        transmitter=PairSource(brightness=0.02, alice_efficiency=0.1, key_basis_probability=0.8),
        security=Security(),
        efficiency=1.16,
    ),
)

PRESETS: Final[Mapping[str, Preset]] = MappingProxyType({one.name: one for one in _ALL})


def preset(name: str) -> Preset:
    """The parameter set of this name. Raises ``ConfigError``, which lists the valid names."""
    try:
        return PRESETS[name]
    except (KeyError, TypeError):
        raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESETS)}") from None
