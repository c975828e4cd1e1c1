"""The loss of a satellite pass over time: a channel that fluctuates, for :class:`OpticalLink`.

Geometry of a circular orbit over a ground station, diffraction of a telescope's beam, and the
atmosphere. It is a smooth mean: no turbulence, no pointing jitter.

* slant range at elevation ``e`` from altitude ``h`` over a sphere of radius ``R``:
  ``sqrt(R^2 sin^2 e + 2 R h + h^2) - R sin e``
* beam: a Gaussian of waist ``w0`` has the radius ``w = w0 sqrt(1 + (z lambda / (pi w0^2))^2)`` at
  the distance ``z``; a telescope of radius ``a`` collects ``1 - exp(-2 a^2 / w^2)`` of it
* atmosphere: the zenith's loss times ``1 / sin e``
"""

import math
from dataclasses import dataclass
from typing import Final

from hybridkex.errors import ConfigError, LinkError
from hybridkex.link.ranges import check_ranges, within

EARTH_RADIUS_KM: Final = 6371.0
GRAVITY_KM3_S2: Final = 398_600.4418
LOWEST_DEG: Final = 10.0
"""No link is attempted below this elevation."""
SAMPLES: Final = 200
"""Moments of a pass in a mean."""
MOST_SECONDS: Final = 1e9
"""The latest time of a pass, in seconds from its beginning."""


@dataclass(frozen=True, kw_only=True)
class SatellitePass:
    """A pass; call it with seconds from its beginning to get the loss in dB."""

    top_elevation_deg: float = 90.0
    """The highest elevation of the pass."""
    altitude_km: float = 500.0
    waist_m: float = 0.15
    """Waist of the beam at the satellite's telescope."""
    aperture_m: float = 0.5
    """Radius of the telescope on the ground."""
    wavelength_nm: float = 850.0
    zenith_loss_db: float = 2.0
    """Loss of the atmosphere at the zenith."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            top_elevation_deg=(0.0, 90.0),
            altitude_km=(1.0, 1e6),
            waist_m=(1e-3, 1e3),
            aperture_m=(1e-3, 1e3),
            wavelength_nm=(1.0, 1e6),
            zenith_loss_db=(0.0, 1e3),
        )
        if not LOWEST_DEG < self.top_elevation_deg <= 90.0:
            raise ConfigError(
                f"the top elevation of a pass must be above {LOWEST_DEG:g} degrees, and at most 90"
            )

    def _angle(self, elevation_deg: float) -> float:
        """The angle at the Earth's centre between station and satellite, in radians."""
        e = math.radians(elevation_deg)
        ratio = EARTH_RADIUS_KM / (EARTH_RADIUS_KM + self.altitude_km)
        return math.acos(ratio * math.cos(e)) - e

    @property
    def _nearest(self) -> float:
        return self._angle(self.top_elevation_deg)

    @property
    def duration_s(self) -> float:
        """Seconds above the lowest elevation."""
        half = math.acos(math.cos(self._angle(LOWEST_DEG)) / math.cos(self._nearest))
        return 2.0 * half / self._rate

    @property
    def _rate(self) -> float:
        """Radians a second along the orbit; the rotation of the Earth is neglected."""
        radius = EARTH_RADIUS_KM + self.altitude_km
        return math.sqrt(GRAVITY_KM3_S2 / radius**3)

    @property
    def mean_loss_db(self) -> float:
        """The constant loss through which as much light arrives as in the whole pass."""
        times = [self.duration_s * (n + 0.5) / SAMPLES for n in range(SAMPLES)]
        return -10.0 * math.log10(math.fsum(10.0 ** (-self(t) / 10.0) for t in times) / SAMPLES)

    def elevation_deg(self, seconds: float) -> float:
        """Elevation in degrees at a time of the pass, in seconds from its beginning.

        Raises ``ConfigError`` for what is not a number of seconds.
        """
        within("seconds", seconds, -MOST_SECONDS, MOST_SECONDS)
        half = self.duration_s / 2.0
        along = self._rate * (seconds - half)
        angle = math.acos(math.cos(along) * math.cos(self._nearest))
        ratio = EARTH_RADIUS_KM / (EARTH_RADIUS_KM + self.altitude_km)
        if angle == 0.0:
            return 90.0
        return math.degrees(math.atan((math.cos(angle) - ratio) / math.sin(angle)))

    def range_km(self, elevation_deg: float) -> float:
        """Distance from the station to the satellite. Raises ``ConfigError``."""
        within("elevation_deg", elevation_deg, -90.0, 90.0)
        s, h = EARTH_RADIUS_KM * math.sin(math.radians(elevation_deg)), self.altitude_km
        return math.sqrt(s * s + 2.0 * EARTH_RADIUS_KM * h + h * h) - s

    def __call__(self, seconds: float) -> float:
        """The loss in dB.

        Raises ``LinkError`` after the pass, when there is no link, and ``ConfigError``.
        """
        within("seconds", seconds, -math.inf, math.inf)
        if not 0.0 <= seconds <= self.duration_s:
            raise LinkError(
                f"the satellite's pass of {self.duration_s:.0f} seconds is over, and the block is "
                "not complete: make fewer or smaller blocks in a pass"
            )
        elevation = self.elevation_deg(seconds)
        z, w0 = 1e3 * self.range_km(elevation), self.waist_m
        spread = z * self.wavelength_nm * 1e-9 / (math.pi * w0 * w0)
        width = w0 * math.sqrt(1.0 + spread * spread)
        collected = -math.expm1(-2.0 * (self.aperture_m / width) ** 2)
        air = self.zenith_loss_db / math.sin(math.radians(elevation))
        return air - 10.0 * math.log10(collected)
