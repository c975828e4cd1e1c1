"""Whether the options of a command ask for QKD keys, and whether they say enough for it.

This is known before a key source is made, whose modules are loaded only where there will be one.
"""

from dataclasses import fields

from hybridkex.cli.qkd_options import KmeOptions, QkdOptions
from hybridkex.errors import ConfigError
from hybridkex.tls.policy import Requirement


def check_kme_options(options: KmeOptions) -> None:
    """Options about a KME need a KME: without ``--kme`` they would be ignored silently.

    Raises:
        ConfigError: there are such options, and no ``--kme``.
    """
    if options.kme is not None:
        return
    for field in fields(options):
        if getattr(options, field.name) is not None:
            raise ConfigError(f"{_option(field.name)} requires --kme, the URL of the KME")


def _check_source_options(options: QkdOptions) -> None:
    """No option that asks for QKD keys is ignored: the channel would have none.

    Raises:
        ConfigError: there are such options, and no source.
    """
    check_kme_options(options.kme)
    if options.kme.kme is None and options.peer_kme_id is not None:
        raise ConfigError("--peer-kme-id requires --kme, the URL of the KME")
    if options.key_pool is None and options.pool_key is not None:
        raise ConfigError("--pool-key requires --key-pool")
    if options.kme.kme is None and options.key_pool is None:
        for name in ("sae", "peer_sae"):
            if getattr(options, name):
                raise ConfigError(
                    f"{_option(name)} applies to QKD keys, and no source of QKD keys is given: add "
                    "--kme or --key-pool"
                )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def qkd_requirement(options: QkdOptions) -> Requirement:
    """The requirement of ``--qkd``.

    Raises:
        ConfigError: it asks for keys, or other options do, and there is no source.
    """
    has_source = options.kme.kme is not None or options.key_pool is not None
    if options.requirement != Requirement.OFF.value:
        _check_source_options(options)
    if options.requirement is None:
        return Requirement.REQUIRE if has_source else Requirement.OFF
    requirement = Requirement(options.requirement)
    if requirement is not Requirement.OFF and not has_source:
        raise ConfigError(f"--qkd {options.requirement} needs --kme or --key-pool")
    return requirement
